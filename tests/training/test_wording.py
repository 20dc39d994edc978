"""Augmentation of texts: what is drawn, how often, of what it depends, and that evaluation and labels never see it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_trainer import setup
from finetune_trainer.data.wording import kept_words, read_synonyms, replaced, swapped
from finetune_trainer.errors import DataError
from finetune_trainer.setup import Setup

from . import tiny
from .runs import EVERY_3, loaded, resumed, run
from .spawn import run_ranks
from .test_tasks import labelled

CPU = torch.device("cpu")
LIST = "# colours\nred, crimson, scarlet\nstone => rock\n"
ALL = {"wordDropout": "0.3", "wordSwap": "0.3", "synonyms": {"probability": "0.5"}}


def make(
    folder: Path, model: Path, augmentation: Any, /, rows: Any = None, listed: str = LIST, problem: str = "multiLabel", **spec: Any
) -> Any:  # fmt: skip
    """A job evaluated on what it trains on; the list of synonyms lies beside the rows."""
    data = tiny.write_rows(folder / "train.jsonl", rows or labelled(40, problem))
    (folder / "synonyms.txt").write_text(listed)
    augmentation = json.loads(json.dumps(augmentation))
    if augmentation and "synonyms" in augmentation:
        augmentation["synonyms"]["uri"] = f"file://{folder}/synonyms.txt"
    training = {"maxSteps": 8, "batchSize": 16, "microBatchSize": 4, "learningRate": "5e-3", "sequenceLength": 64}
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}, "augmentation": augmentation}
    objective = {"classification": {"problem": problem}}
    return tiny.job(
        folder, model, data, task="text-classification", objective=objective, method={"full": {}}, dataset=dataset,
        **spec | {"training": training | spec.get("training", {})},
    )  # fmt: skip


def texts(made: Setup, batch: Any) -> list[str]:
    pieces = batch.tokens[0].split(list(batch.documents.lengths))
    return [made.tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces]


@pytest.mark.parametrize("kind", ["drop", "swap", "replace"])
def test_as_many_words_change_as_was_asked(kind: str) -> None:
    """Of 20,000 words within five standard deviations; the words themselves stay what they were."""
    words = [f"word{i}" for i in range(20_000)]
    draw = np.random.default_rng(3)
    if kind == "drop":
        kept = kept_words(len(words), 0.2, draw)
        assert kept == sorted(set(kept))
        changed, probability = len(words) - len(kept), 0.2
    elif kind == "swap":
        found = swapped(words, 0.2, draw)
        assert sorted(found) == sorted(words)
        at = {word: i for i, word in enumerate(found)}
        assert max(abs(i - at[word]) for i, word in enumerate(words)) == 1
        changed, probability = sum(a != b for a, b in zip(words, found, strict=True)) / 2, 0.2 / 1.2
    else:
        found = replaced(words, {word: ["other", "another"] for word in words}, 0.2, draw)
        assert set(found) - set(words) == {"other", "another"}
        changed, probability = sum(a != b for a, b in zip(words, found, strict=True)), 0.2
    assert abs(changed / len(words) - probability) < 5 * (probability / len(words)) ** 0.5


def test_a_text_keeps_a_word_its_gaps_and_its_capitals() -> None:
    draw = np.random.default_rng(0)
    assert all(len(kept_words(3, 0.99, draw)) >= 1 for _ in range(50))
    assert kept_words(0, 0.5, draw) == []
    synonyms = read_synonyms(["a film, movie", "good => very fine", "# no", ""], "list")
    assert synonyms == {"a film": ["movie"], "movie": ["a film"], "good": ["very fine"]}
    found = replaced(['"Good"', "GOOD,", "good.", "goods", "—"], synonyms, 1.0, draw)
    assert found == ['"Very fine"', "VERY FINE,", "very fine.", "goods", "—"]


@pytest.mark.parametrize(
    ("listed", "sentence"), [("red\n", "row 1"), ("\n# x\nred => Red", "row 3"), ("# x", "no synonyms")]
)
def test_a_list_that_says_nothing_is_refused_by_line(listed: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_synonyms(listed.splitlines(), "list.txt")


def test_evaluation_and_labels_are_as_without(tmp_path: Path) -> None:
    """Batches of evaluation, labels, targets and everything that decides the order are bit for bit those of a job without."""
    model = tiny.make_encoder(tmp_path / "model")
    plain, changed = (
        loaded(make(tmp_path / name, model, augmentation), tmp_path / name)
        for name, augmentation in (("plain", None), ("changed", ALL))
    )
    ids = [np.array([row]) for row in changed.division.train]
    batches = [one.objective.batch(one.rows, ids, CPU) for one in (plain, changed)]
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    seen = changed.objective.train_batch(changed.rows, ids, CPU, 3)
    assert torch.equal(seen.targets, batches[0].targets)
    assert np.array_equal(plain.rows.tokens, changed.rows.tokens)
    assert [np.concatenate(step).tolist() for step in plain.order.epoch(1)] == [
        np.concatenate(step).tolist() for step in changed.order.epoch(1)
    ]
    before, after = texts(changed, batches[0]), texts(changed, seen)
    allowed = {*tiny.WORDS, "crimson", "scarlet", "rock"}
    assert before != after and all(text and set(text.split()) <= allowed for text in after)
    words = {word for text in after for word in text.split()}
    assert "rock" in words and words & {"crimson", "scarlet"}


def test_what_is_drawn_depends_on_seed_step_and_row_alone(tmp_path: Path) -> None:
    model = tiny.make_encoder(tmp_path / "model")
    first, other = (loaded(make(tmp_path, model, ALL, training={"seed": seed}), tmp_path) for seed in (1, 2))
    rows = [np.array([row]) for row in range(12)]
    alone = [texts(first, first.objective.train_batch(first.rows, [row], CPU, 5))[0] for row in rows]
    assert texts(first, first.objective.train_batch(first.rows, rows[::-1], CPU, 5))[::-1] == alone
    assert texts(first, first.objective.train_batch(first.rows, rows, CPU, 6)) != alone
    assert texts(other, other.objective.train_batch(other.rows, rows, CPU, 5)) != alone


@pytest.mark.parametrize("problem", ["multiLabel", "regression"])
def test_a_resumed_run_ends_with_the_same_bytes_and_two_ranks_train_alike(tmp_path: Path, problem: str) -> None:
    model = tiny.make_encoder(tmp_path / "model", dropout=0.0)
    resumed(make(tmp_path, model, ALL, problem=problem, checkpoints=EVERY_3), tmp_path, 3)
    if problem == "multiLabel":
        job = make(tmp_path / "two", model, ALL, problem=problem)
        verdict = run_ranks(job, tmp_path / "two", 2)
        assert verdict.code == 0, verdict.message
        found = [float.fromhex(loss) for loss in tiny.losses(tmp_path / "two/output")]
        alone = [float.fromhex(loss) for loss in tiny.losses(tmp_path / "output")]
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


def test_other_synonyms_are_other_data(tmp_path: Path) -> None:
    model = tiny.make_encoder(tmp_path / "model")
    digests = []
    for listed in (LIST, LIST + "lamp, light\n"):
        job = make(tmp_path, model, ALL, listed=listed)
        digests.append(setup.read(job.spec, tiny.context(job, tmp_path / "scratch")).inputs.dataset_digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("rows", "listed", "augmentation", "sentence"),
    [
        ([{"text": word, "label": ["a"]} for word in ("天气很好", "今天下雨")] * 4, LIST, {"wordSwap": "0.1"}, "no training text has two words"),
        (None, "zebra, horse-like\n", {"synonyms": {}}, "none of the 2 words"),
        (None, "red\n", {"synonyms": {}}, "synonyms.txt row 1"),
    ],
)  # fmt: skip
def test_what_would_change_nothing_is_refused(tmp_path: Path, rows: Any, listed: str, augmentation: Any, sentence: str) -> None:  # fmt: skip
    model = tiny.make_encoder(tmp_path / "model")
    rows = rows and [*rows, {"text": rows[0]["text"] + "a", "label": ["b"]}]
    job = make(tmp_path, model, augmentation, rows=rows, listed=listed)
    verdict = run(job, tmp_path)
    assert verdict.code != 0 and sentence in verdict.message, verdict.message
