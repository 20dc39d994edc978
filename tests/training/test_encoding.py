"""What rows of pairs, single answers and plain text become: which tokens are learned, what is cut, and that nothing of a long text is lost."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainer.data import prepare
from finetune_trainer.data.prepared import RowSet
from finetune_trainer.errors import DataError
from finetune_trainer.train import run

from . import tiny
from .test_prepare import prepared

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "red"), ("assistant", "red stone"), ("assistant", "blue"))
)
EARLIER = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]

ROWS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "red", "chosen": "red stone", "rejected": "blue"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "messages behind a text": {"prompt": "red", "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations, and their prompt": {"prompt": "red", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


def parts(rows: RowSet, row: int, tokenizer: Any) -> list[tuple[str, str]]:
    """Of both sequences of a row: the text, and what is learned of it."""
    start, end = int(rows.offsets[row]), int(rows.offsets[row + 1])
    middle = start + int(rows.splits[row])
    return [
        (tokenizer.decode(rows.tokens[a:b]), tokenizer.decode(rows.tokens[a:b][rows.learned[a:b]]))
        for a, b in ((start, middle), (middle, end))
    ]


@pytest.mark.parametrize("case", ROWS)
def test_a_pair_is_the_same_however_it_is_written(tmp_path: Path, case: str) -> None:
    rows = prepared(tmp_path, [ROWS[case]], objective={"dpo": {}})
    asked = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    assert parts(rows, 0, tiny.tokenizer()) == [
        (f"{asked}red stone<|im_end|>\n", "red stone<|im_end|>"),
        (f"{asked}blue<|im_end|>\n", "blue<|im_end|>"),
    ]
    assert rows.targets.tolist() == [1]


@pytest.mark.parametrize("explicit", [True, False])
def test_earlier_answers_belong_to_the_prompt(tmp_path: Path, explicit: bool) -> None:
    before = [*EARLIER, USER]
    row: dict[str, Any] = {"prompt": before, "chosen": [GOOD], "rejected": [BAD]}
    if not explicit:
        row = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
    rows = prepared(tmp_path, [row], objective={"orpo": {}})
    assert [learned for _, learned in parts(rows, 0, tiny.tokenizer())] == ["red stone<|im_end|>", "blue<|im_end|>"]


def test_of_texts_without_a_prompt_what_differs_is_learned(tmp_path: Path) -> None:
    row = {"chosen": "Human: red\n\nAssistant: red stone", "rejected": "Human: red\n\nAssistant: blue"}
    rows = prepared(tmp_path, [row], objective={"dpo": {}}, tokenizer=tiny.tokenizer(template=None))
    found = parts(rows, 0, tiny.tokenizer())
    assert [learned for _, learned in found] == ["red stone<|im_end|>", "blue<|im_end|>"]
    with pytest.raises(DataError, match=r"train.jsonl row 1: objective.kto .* has no prompt"):
        prepared(tmp_path / "kto", [row], name="train.jsonl", objective={"kto": {}})


@pytest.mark.parametrize("pair", [True, False])
def test_kto_puts_a_prompt_before_the_answer_of_the_row_before(tmp_path: Path, pair: bool) -> None:
    given = [
        {"prompt": "red", "completion": "one", "label": True},
        {"prompt": "red", "completion": "two", "label": "false"},
        {"prompt": "blue", "completion": "three", "label": 1},
        {"prompt": "blue", "completion": "four", "label": 0},
    ]
    if pair:
        given = [{"prompt": "red", "chosen": "one", "rejected": "two"}, {"prompt": "blue", "chosen": "three", "rejected": "four"}]  # fmt: skip
    rows = prepared(tmp_path, given, objective={"kto": {}}, tokenizer=tiny.tokenizer(template=None))
    found = [[text.removesuffix("<|im_end|>") for text, _ in parts(rows, i, tiny.tokenizer())] for i in range(4)]
    assert found == [
        ["red\n\none", "red\n\nfour"],
        ["red\n\ntwo", "red\n\none"],
        ["blue\n\nthree", "blue\n\ntwo"],
        ["blue\n\nfour", "blue\n\nthree"],
    ]
    assert [float(rows.labels_of(i)[0]) for i in range(4)] == [1, 0, 1, 0]


def test_kto_has_the_answer_of_the_row_before_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "BATCH_ROWS", 2)
    given = [{"prompt": "red", "completion": word, "label": True} for word in ("one", "two", "three")]
    rows = prepared(tmp_path, given, objective={"kto": {}}, tokenizer=tiny.tokenizer(template=None))
    others = [parts(rows, i, tiny.tokenizer())[1][1].removesuffix("<|im_end|>") for i in range(3)]
    assert others == ["two", "one", "two"]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_margin_that_is_none_is_of_no_interest_but_to_rewards(tmp_path: Path, objective: str) -> None:
    assert len(prepared(tmp_path, [ROWS["texts"] | {"margin": "wide"}], objective={objective: {}}).targets)


CUTS = {
    "fits": ("p" * 10, "c" * 5, "r" * 8, "p" * 10, "c" * 5 + "E", "r" * 8 + "E"),
    "a long answer loses its end": ("p" * 10, "c" * 30, "r" * 2, "p" * 10, "c" * 12, "rrE"),
    "a long prompt its beginning, of both alike": ("q" * 10 + "p" * 10, "c" * 30, "r" * 2, "p" * 10, "c" * 12, "rrE"),
}


@pytest.mark.parametrize("case", CUTS)
def test_what_is_too_long_is_cut_so_that_half_is_left_for_answers(tmp_path: Path, case: str) -> None:
    prompt, chosen, rejected, *expected = CUTS[case]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    rows = prepared(
        tmp_path, [row], objective={"dpo": {}}, tokenizer=tiny.tokenizer(template=None), training={"sequenceLength": 24}
    )
    both = [text.replace("<|im_end|>", "E") for text, _ in parts(rows, 0, tiny.tokenizer())]
    assert both == [f"{expected[0]}\n\n{answer}" for answer in expected[1:]]
    assert rows.truncated.sum() == (case != "fits")


def test_a_cut_prompt_keeps_the_token_that_begins_a_text(tmp_path: Path) -> None:
    rows = prepared(tmp_path, [ROWS["messages"]], objective={"reward": {}}, training={"sequenceLength": 30})
    assert [text[: len("<|im_start|>")] for text, _ in parts(rows, 0, tiny.tokenizer())] == ["<|im_start|>"] * 2
    assert [learned for _, learned in parts(rows, 0, tiny.tokenizer())] == ["red stone<|im_end|>", "blue<|im_end|>"]


def test_of_a_long_text_every_token_is_learned_once(tmp_path: Path) -> None:
    """A row begins with the last token of the one before."""
    texts = ["a" * 5, "".join(chr(97 + i % 26) for i in range(50)), "b" * 16]
    rows = prepared(tmp_path, [{"text": text} for text in texts], objective={"pretrain": {}}, training={"sequenceLength": 16})  # fmt: skip
    assert int(rows.lengths.max()) == 16 and not rows.truncated.any()
    tokenizer = tiny.tokenizer()
    pieces = [rows.tokens[a:b] for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]
    for number, text in enumerate(texts, start=1):
        own = [piece for piece, row in zip(pieces, rows.numbers, strict=True) if row == number]
        assert tokenizer.decode(np.concatenate([own[0], *(piece[1:] for piece in own[1:])])) == f"{text}<|im_end|>"
        assert all(before[-1] == after[0] for before, after in itertools.pairwise(own))
    assert rows.targets.sum() == sum(map(len, texts))
    assert all(rows.learned[a + 1 : b].all() for a, b in itertools.pairwise(rows.offsets))


def test_pretraining_learns_a_domain(tmp_path: Path, llama: Path) -> None:
    data = tiny.write_rows(tmp_path / "train.jsonl", [{"text": " ".join(tiny.WORDS * 30)}])
    job = tiny.job(
        tmp_path, llama, data, objective={"pretrain": {}}, method={"full": {}},
        training={"maxSteps": 12, "batchSize": 4, "learningRate": "3e-3", "sequenceLength": 128},
        dataset={"evaluation": {"sources": [{"uri": f"file://{data}"}]}},
    )  # fmt: skip
    verdict = run(job, tiny.context(job, tmp_path / "scratch"))
    assert verdict.code == 0, verdict.message
    before, after = (float.fromhex(loss) for loss in tiny.losses(tmp_path / "output", "eval_loss_hex"))
    assert after < before - 0.5


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no pair": ({"text": "secret"}, {"dpo": {}}, "a.jsonl row 1: no column 'chosen'"),
    "no answer": (
        {"chosen": [USER], "rejected": [USER]},
        {"dpo": {}},
        "column 'chosen' has no message of the assistant behind the prompt",
    ),
    "half a pair": ({"prompt": "secret", "chosen": "c", "rejected": ""}, {"orpo": {}}, "column 'rejected' must be text"),
    "label": ({"prompt": "p", "completion": "c", "label": "secret"}, {"kto": {}}, "column 'label' must say whether"),
    "margin": ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "secret"}, {"reward": {}}, "column 'margin' must be a number"),
    "chat to pretrain": ({"messages": [USER, GOOD]}, {"pretrain": {}}, "no column 'text'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "objective"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"dpo": {}}),
        ({"chosen": "a whole one", "rejected": "another"}, {"dpo": {}}),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {"reward": {}}),
        ({"prompt": [USER], "completion": [GOOD], "label": True}, {"kto": {}}),
        (
            {"prompt": [USER]},
            {"grpo": {"rewards": [{"name": "r", "regex": {"pattern": "x"}}], "maxCompletionLength": 8}},
        ),
    ],
)
def test_a_named_column_beside_messages_is_not_passed_over(
    tmp_path: Path, row: dict[str, Any], objective: dict[str, Any]
) -> None:
    dataset = {"columns": {"system": "rules"}}
    with pytest.raises(
        DataError, match=r"row 1: column 'rules' \(dataset.columns.system\) is for prompts that are text"
    ):
        prepared(tmp_path, [{**row, "rules": "secret"}], objective=objective, dataset=dataset)
    prepared(tmp_path, [{**row, "rules": None}], objective=objective, dataset=dataset)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_not_quoted(tmp_path: Path, case: str) -> None:
    row, objective, sentence = WRONG[case]
    with pytest.raises(DataError) as raised:
        prepared(tmp_path, [row], objective=objective)
    assert sentence in str(raised.value) and "secret" not in str(raised.value)
