"""What becomes of rows: too long, too short, twice, in the evaluation too, beyond the budget. And the report that tells of it."""

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_crds.resolution import ResolvedFineTune
from finetune_trainer.data import near_duplicates
from finetune_trainer.data.formats import Chat, Instruction
from finetune_trainer.data.near_duplicates import repeated, signature, words
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.data.selection import Selection, select
from finetune_trainer.errors import DataError, UserError

from . import tiny
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
    with pytest.raises(DataError, match="every row is left out, 3 as too long .* and 0 as too short"):
        prepared(tmp_path / "none", [long] * 3, task=task, dataset={"tooLong": "drop"}, training={"sequenceLength": 64})


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
