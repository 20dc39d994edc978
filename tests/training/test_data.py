"""What becomes of rows: too long, too short, twice, in the evaluation too, beyond the budget. And the report that tells of it."""

import base64
import dataclasses
import io
import itertools
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from finetune_crds.resolved import ResolvedFineTune
from finetune_trainer.data import near_duplicates
from finetune_trainer.data.formats import Chat, Instruction
from finetune_trainer.data.holdout import divide
from finetune_trainer.data.near_duplicates import repeated, signature, words
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.data.selection import Selection, select
from finetune_trainer.errors import DataError, UserError
from finetune_trainer.reporting import data_report
from finetune_trainer.reporting.data_report import DataReport, Shown

from . import pictures, tiny
from .test_prepare import prepared

LONG = " ".join(random.Random(3).choices(tiny.WORDS, k=200))


def decoded(rows: RowSet, row: int, *, learned: bool = False, **_: Any) -> str:
    """The text of a row, or what is learned of it."""
    span = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
    tokens = rows.tokens[span]
    return str(tiny.tokenizer().decode(tokens[rows.learned[span]] if learned else tokens))


def chosen(rows: RowSet, *, seed: int = 1, **dataset: Any) -> Selection:
    spec = tiny.job(Path("/x"), Path("/m"), Path("/d.jsonl"), dataset=dataset).spec
    assert isinstance(spec, ResolvedFineTune)
    train, evaluated = np.flatnonzero(rows.sources >= 0), np.flatnonzero(rows.sources < 0)
    return select(rows, train, evaluated, spec.dataset, seed)


def chat(*contents: str) -> dict[str, Any]:
    roles = itertools.cycle(["user", "assistant"])
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


LONG_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a prompt loses its beginning": (chat(f"{LONG} what?", "answer"), "answer<|im_end|>", "what?<|im_end|>\n"),
    "an instruction's too": ({"prompt": f"{LONG} what?", "completion": "answer"}, "answer<|im_end|>", "what?<|im_end|>\n"),
    "later turns go first": (chat("what?", "answer", LONG, "lost"), "answer<|im_end|>", "<|im_start|>user\nwhat?"),
    "an answer that is too long by itself": (chat("what?", LONG), LONG[:50], "<|im_start|>user\nwhat?"),
    "a system message stays": (
        {"messages": [{"role": "system", "content": "be kind"}, *chat(LONG + " é what?", "answer")["messages"]]},
        "answer<|im_end|>", "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n",
    ),
    "a character of several tokens": (chat("é" * 300 + "what?", "answer"), "answer<|im_end|>", "éwhat?<|im_end|>\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", LONG_ROWS)
def test_a_long_conversation_keeps_its_first_answer(tmp_path: Path, case: str) -> None:
    row, learned, beside = LONG_ROWS[case]
    rows = prepared(tmp_path, [row], training={"sequenceLength": 100})
    assert learned in decoded(rows, 0, learned=True) and beside in decoded(rows, 0)
    assert 97 <= rows.lengths[0] <= 100 and rows.truncated[0]
    assert "lost" not in decoded(rows, 0)


def test_without_a_template_too(tmp_path: Path) -> None:
    row = {"prompt": f"{LONG} what?", "completion": "answer"}
    rows = prepared(tmp_path, [row], tokenizer=tiny.tokenizer(None), training={"sequenceLength": 100})
    assert decoded(rows, 0, learned=True) == "answer<|im_end|>"
    assert decoded(rows, 0).endswith(" what?\n\nanswer<|im_end|>") and rows.lengths[0] == 100


def test_all_is_learned_from_the_beginning(tmp_path: Path) -> None:
    """With lossOn: all no part of a row is the answer."""
    rows = prepared(tmp_path, [chat(LONG, "answer")], training={"sequenceLength": 100}, objective={"sft": {"lossOn": "all"}})  # fmt: skip
    assert decoded(rows, 0).startswith(f"<|im_start|>user\n{LONG[:50]}")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("length", [3, 8, 9, 15, 16, 17, 500])
def test_a_split_text_loses_no_token_and_learns_each_once(tmp_path: Path, length: int, begins: bool) -> None:
    tokenizer = tiny.tokenizer()
    if begins:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    text = (LONG * 3)[:length]
    row = {"text": text}
    whole = prepared(tmp_path / "whole", [row], tokenizer=tokenizer)
    split = prepared(
        tmp_path / "split", [row], tokenizer=tokenizer, dataset={"tooLong": "split"}, training={"sequenceLength": 8}
    )
    parts = [split.tokens[a:b] for a, b in itertools.pairwise(split.offsets)]
    masks = [split.learned[a:b] for a, b in itertools.pairwise(split.offsets)]
    learned = [token for part, mask in zip(parts, masks, strict=True) for token in part[1:][mask[1:]]]
    assert learned == whole.tokens[1:].tolist()
    assert split.targets.sum() == len(learned) and split.lengths.max() <= 8 and min(split.targets) > 0
    assert all(part[0] == 1 for part in parts) or not begins
    assert not split.truncated.any() and set(split.examples) == {0}


def test_split_is_for_plain_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tooLong: split is for plain text, and .*a.jsonl row 1 has a prompt"):
        prepared(tmp_path, tiny.chat_rows(3), dataset={"tooLong": "split"})


@pytest.mark.parametrize(
    ("task", "long"),
    [("text-generation", {"text": LONG}), ("text-classification", {"text": LONG, "label": "a"})],
)
def test_rows_too_long_or_too_short_are_dropped_and_counted(tmp_path: Path, task: str, long: dict[str, Any]) -> None:
    labels = {"label": "b"} if "label" in long else {}
    fine, short = {"text": "one two three", **labels}, {"text": "ab", **labels}
    data = [long, short, fine, long, fine | long | {"text": "two three one"}]
    rows = prepared(
        tmp_path, data, task=task, dataset={"tooLong": "drop", "minTokens": 6}, training={"sequenceLength": 64}
    )
    assert rows.numbers.tolist() == [3, 5]
    assert rows.index.tallies[0].model_dump() == {"read": 5, "too_long": 2, "too_short": 1}
    with pytest.raises(DataError, match=r"every row is left out, 3 as too long .* and 0 as too short"):
        prepared(tmp_path / "none", [long] * 3, task=task, dataset={"tooLong": "drop"}, training={"sequenceLength": 64})


SHORT: dict[str, tuple[str, list[dict[str, Any]], list[int]]] = {
    "a pair by its longer answer": (
        "dpo", [{"prompt": "red", "chosen": "one", "rejected": rejected} for rejected in ("two", "x" * 30, "x" * 20)], [2]
    ),
    "which may be the better one": ("reward", [{"chosen": "x" * n, "rejected": "y"} for n in (33, 39)], [2]),
    "a single one by its own": (
        "kto", [{"prompt": "red", "completion": "x" * n, "label": True} for n in (40, 3, 31, 3)], [1, 3]
    ),
    "a pair of single ones": ("kto", [{"prompt": "red", "chosen": "x" * n, "rejected": "y"} for n in (12, 31)], [2, 2]),
}  # fmt: skip
"""Objective, rows, and the numbers of those that have 35 tokens with their prompt."""


@pytest.mark.parametrize("case", SHORT)
def test_of_answers_compared_the_longer_one_is_measured(tmp_path: Path, case: str) -> None:
    objective, data, left = SHORT[case]
    options = {"tokenizer": tiny.tokenizer(None), "objective": {objective: {}}, "training": {"sequenceLength": 64}}
    assert prepared(tmp_path, data, dataset={"minTokens": 35}, **options).numbers.tolist() == left


def test_equal_rows_are_counted_and_left_out_on_request(tmp_path: Path) -> None:
    data = tiny.chat_rows(40)
    held_out = tiny.write_rows(tmp_path / "held.jsonl", [data[3], data[9], *tiny.chat_rows(5, seed=1)])
    evaluation = {"evaluation": {"sources": [{"uri": f"file://{held_out}"}]}}
    rows = prepared(tmp_path, [*data, data[0], data[3], data[0]], dataset=evaluation)
    counted = chosen(rows)
    numbers = [rows.numbers[ids].tolist() for ids in (counted.duplicates, counted.leaked)]
    assert numbers == [[41, 43], [4, 10, 42]]
    assert (len(counted.train), counted.dropped) == (43, 0)
    without = chosen(rows, deduplicate="exact")
    assert (len(without.train), without.dropped) == (38, 5)
    assert not set(without.train) & {*without.duplicates, *without.leaked}
    with pytest.raises(DataError, match="every training row equals a row of evaluation"):
        chosen(prepared(tmp_path / "all", data[3:4], dataset=evaluation), deduplicate="exact")


def test_a_text_in_pieces_stays_or_goes_as_one(tmp_path: Path) -> None:
    text, other = {"text": LONG}, {"text": LONG[::-1]}
    rows = prepared(tmp_path, [text, other, text], dataset={"tooLong": "split"}, training={"sequenceLength": 64})
    pieces = np.bincount(rows.examples)
    assert len(pieces) == 3 and min(pieces) > 5
    without = chosen(rows, deduplicate="exact")
    assert len(without.duplicates) == 1 and without.train.tolist() == list(range(pieces[0] + pieces[1]))


def test_nearly_equal_rows_are_found_by_their_words(tmp_path: Path) -> None:
    system = {"role": "system", "content": LONG[:300]}
    texts = [" ".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=100)) for i in range(6)]
    nearly = [texts[0].upper() + "!", texts[1] + " more", texts[2].replace(texts[2][:4], "z z", 1)]
    other = [" ".join(texts[3].split()[:50] + texts[4].split()[50:])]
    data = [{"messages": [system, *chat(text, "yes")["messages"]]} for text in [*texts, *nearly, *other]]
    held_out = tiny.write_rows(tmp_path / "held.jsonl", [data[6]])
    rows = prepared(
        tmp_path,
        data[:6] + data[7:],
        dataset={"deduplicate": "near", "evaluation": {"sources": [{"uri": f"file://{held_out}"}]}},
        training={"sequenceLength": 1000},
    )
    without = chosen(rows, deduplicate="near")
    assert rows.numbers[without.leaked].tolist() == [1] and rows.numbers[without.duplicates].tolist() == [7, 8]
    assert rows.numbers[without.train].tolist() == [2, 3, 4, 5, 6, 9]


def test_signatures_estimate_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the similarity itself; the standard error at so many places is below 0.05."""
    monkeypatch.setattr(near_duplicates, "_AT_ONCE", 16)
    whole = [str(i) for i in range(300)]
    for shared in (300, 270, 200, 100):
        other = [*whole[:shared], *(f"x{i}" for i in range(300 - shared))]
        runs = [{tuple(text[i : i + 5]) for i in range(296)} for text in (whole, other)]
        similarity = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        assert abs((signature(whole) == signature(other)).mean() - similarity) < 0.15
    few = np.stack([signature(whole), signature(whole[:295]), signature(whole[:290]), signature(whole[150:])] * 5)
    assert repeated(few, np.arange(20)).tolist() == [False, True, True, False, *[True] * 16]
    assert repeated(few, np.array([3, 0, 1]), 1).tolist() == [False, False, False]


def test_words() -> None:
    assert words(Instruction("Ein Haus!", "ja_1", system="hidden")) == ["ein", "haus", "ja_1"]
    assert words(Chat([{"role": "system", "content": "hidden"}, {"role": "user", "content": "猫が3匹 cats"}])) == ["猫", "が", "3", "匹", "cats"]  # fmt: skip
    assert words(Instruction("?", "!")) == ["? !"]


def test_a_budget_is_drawn_by_seed(tmp_path: Path) -> None:
    rows = prepared(tmp_path, tiny.chat_rows(200))
    total = int(rows.lengths.sum())
    first, again, other = (chosen(rows, seed=seed, tokenBudget=total // 3) for seed in (1, 1, 2))
    assert first.train.tolist() == again.train.tolist() != other.train.tolist()
    for each in (first, other):
        assert total / 3 - 1000 < rows.lengths[each.train].sum() <= total / 3
        assert len(each.train) + len(each.over_budget) == 200 and each.dropped == len(each.over_budget)
    assert 40 < np.median(first.train) < 160, "from the whole set"
    with pytest.raises(DataError, match="tokenBudget 3 is less than a row"):
        chosen(rows, tokenBudget=3)
    assert dataclasses.astuple(chosen(rows, tokenBudget=total))[0].tolist() == list(range(200))


def reported(
    folder: Path, data: list[dict[str, Any]], *, tokenizer: Any = None, **spec: Any
) -> tuple[DataReport, list[Shown], str]:
    tokenizer = tokenizer or tiny.tokenizer()
    rows = prepared(folder, data, tokenizer=tokenizer, **spec)
    job = tiny.job(folder, Path("/model"), folder / "a.jsonl", **{"training": {"sequenceLength": 1024}, **spec}).spec
    assert isinstance(job, ResolvedFineTune)
    division = divide(job, rows)
    files = data_report.files(job, rows, division, tokenizer)
    assert files == data_report.files(job, rows, division, tokenizer)
    found = DataReport.model_validate_json(files[data_report.JSON])
    return found, data_report.examples(job, rows, division, tokenizer), files[data_report.HTML].decode()


def test_the_report_accounts_for_every_row(tmp_path: Path) -> None:
    data = [*tiny.chat_rows(300), *tiny.chat_rows(20), chat(LONG, LONG), chat("x", "y")]
    choices = {"tooLong": "drop", "minTokens": 45, "deduplicate": "exact", "tokenBudget": 20_000}
    dataset = {"evaluation": {"fraction": "0.1"}, **choices}
    report, _, _ = reported(tmp_path, data, dataset=dataset, training={"sequenceLength": 300})
    total = report.total
    left_out = [total.too_long, total.too_short, total.duplicates, total.over_budget]
    assert min(left_out) > 0 and total.read == 322 == total.trained + total.held_out + sum(left_out)
    assert sum(report.lengths.training) == total.sequences == total.trained and total.tokens <= 20_000
    assert sum(report.lengths.evaluation) == total.held_out > 0
    assert len(report.duplicates) == min(20, total.duplicates)
    assert report.findings[0] == f"{total.duplicates} rows of training equal earlier ones and were left out."


def test_the_report_shows_what_is_learned(tmp_path: Path) -> None:
    data = [chat("one <script>?", "two & é"), chat(LONG * 2, "three")]
    report, shown, page = reported(tmp_path, data)
    whole = next(one for one in shown if one.place == "a.jsonl row 1")
    assert [segment.text for segment in whole.segments] == [
        "<|im_start|>user\none <script>?<|im_end|>\n<|im_start|>assistant\n", "two & é<|im_end|>", "\n",
    ]  # fmt: skip
    assert [segment.learned for segment in whole.segments] == [False, True, False]
    assert "<mark>two &amp; é&lt;|im_end|&gt;</mark>" in page and "<script" not in page
    assert f"… {1024 - 800} tokens …" in page
    assert not set(report.model_dump_json().split()) & set(tiny.WORDS), "text is on the page only"


def test_of_pairs_the_report_counts_the_tokens_of_both_answers(tmp_path: Path) -> None:
    data = [{"prompt": "a" * 200, "chosen": "b" * (99 + i), "rejected": "c" * (99 + i)} for i in range(20)]
    held_out = {"evaluation": {"fraction": "0"}}
    report, shown, _ = reported(tmp_path, data, objective={"dpo": {}}, dataset=held_out)
    assert report.total.targets == sum(2 * (99 + i + 1) for i in range(20)), "with the token that ends each"
    assert shown[0].targets == sum(len(segment.text.removesuffix("<|im_end|>")) + 1 for segment in shown[0].segments if segment.learned)  # fmt: skip
    assert not any("learned" in finding for finding in report.findings)


def test_a_slice_without_a_row_is_told(tmp_path: Path) -> None:
    slices = [{"name": name, "column": "region", "value": name} for name in ("eu", "mars")]
    data = [row | {"region": "eu"} for row in tiny.chat_rows(20)]
    spec = {"dataset": {"evaluation": {"fraction": "0.3"}}, "evaluation": {"slices": slices}}
    report, _, _ = reported(tmp_path, data, **spec)
    assert report.findings == [
        "No held-out row is in these of evaluation.slices, and nothing is measured of them: mars."
    ]


class Page(HTMLParser):
    """What a browser would load, and whether each element ends."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [tag for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        self.loads += [tag] * (tag in ("script", "link", "img", "iframe", "object"))
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing stays open."""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "chat": (tiny.chat_rows(30), {}),
    "split": ([{"text": LONG}] * 3, {"dataset": {"tooLong": "split"}, "training": {"sequenceLength": 64}}),
    "classes": ([{"text": f"t {i}", "label": "a" if i % 9 else "<b>"} for i in range(40)], {"task": "text-classification"}),
    "numbers": (
        [{"text": f"t {i}", "label": i / 4} for i in range(9)],
        {"task": "text-classification", "objective": {"classification": {"problem": "regression"}}},
    ),
    "tags": ([{"tokens": ["Ann", "ran"], "tags": ["B-PER", "O"]}] * 3, {"task": "token-classification"}),
    "questions": (
        [{"question": "who?", "context": "Ann ran", "answers": {"text": ["Ann"], "answer_start": [0]}}, {"question": "what?", "context": "Ann ran", "answers": {"text": [], "answer_start": []}}],
        {"task": "question-answering"},
    ),
    "pairs": ([{"source": "<b> red", "target": "red red"}] * 3, {"task": "summarization"}),
    "preferences": ([{"prompt": "<b> who?", "chosen": "Ann", "rejected": "Bob"}] * 3, {"objective": {"dpo": {}}}),
    "judged": (
        [{"prompt": "who?", "completion": "Ann", "label": True}, {"prompt": "who?", "completion": "Bob", "label": False}],
        {"objective": {"kto": {}}},
    ),
    "prompts": (
        [{"prompt": "<b> who?"}] * 3,
        {"objective": {"grpo": {"maxCompletionLength": 9, "rewards": [{"name": "form", "regex": {"pattern": "x"}}]}}},
    ),
}  # fmt: skip


def test_images_are_shown_small_with_their_class(tmp_path: Path) -> None:
    pictures.write_folder(tmp_path)
    (tmp_path / "red/0.png").write_bytes(pictures.encoded(pictures.picture("red", 0).resize((900, 300))))
    data = [{"image": f"{name}/{i}.png", "label": name} for name in pictures.COLOURS for i in range(5)]
    report, shown, page = reported(tmp_path, data, task="image-classification", training={"batchSize": 2})
    assert len(shown) == 10 and [(one.place, one.label) for one in report.images] == [
        (one.place, *one.labels) for one in shown
    ]
    assert set(Page(page).loads) == {"img"} and page.count("<img") == page.count('src="data:image/jpeg;base64,') == 10
    sizes = []
    for one in shown:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.image.partition(",")[2]))))
        sizes.append(image.shape[:2])
        assert pictures.COLOURS[image.mean((0, 1)).argmax()] == one.labels[0]
        assert f'alt="{one.place}"' in page
    assert max(max(size) for size in sizes) <= 128


@pytest.mark.parametrize("task", TASKS)
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, task: str) -> None:
    data, spec = TASKS[task]
    model = tiny.make_encoder(tmp_path / "m") if task in ("tags", "questions") else None
    tokenizer = AutoTokenizer.from_pretrained(model) if model else None
    report, shown, page = reported(tmp_path, data, tokenizer=tokenizer, **spec)
    assert Page(page).loads == []
    assert "http" not in page and "url(" not in page
    learned = {(segment.text.strip(), segment.label) for one in shown for segment in one.segments if segment.learned}
    match task:
        case "split":
            assert report.total.in_pieces == 3 and report.total.sequences > 30
        case "classes":
            assert list(report.labels) == ["a", "<b>"] and '<span class="pill">&lt;b&gt;</span>' in page
            assert report.findings[-1].startswith("Classes with fewer than 10 rows")
        case "numbers":
            assert not report.labels and {label for one in shown for label in one.labels} >= {"0.25", "2"}
        case "tags":
            assert learned == {("A", "B-PER"), ("r", "O")} and report.labels["B-PER"].training == 3
        case "questions":
            assert learned == {("Ann", "")} and [one.labels for one in shown if one.labels] == [["no answer here"]]
        case "pairs":
            assert {text for text, _ in learned} == {"red red<|im_end|>"} and "&lt;b&gt; red" in page
        case "preferences":
            assert {text for text, _ in learned} == {"Ann<|im_end|>", "Bob<|im_end|>"} and "&lt;b&gt; who?" in page
        case "judged":
            assert {text for text, _ in learned} == {"Ann<|im_end|>", "Bob<|im_end|>"}
        case "prompts":
            assert not learned and "&lt;b&gt; who?" in page
