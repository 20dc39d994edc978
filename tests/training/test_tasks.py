"""Tasks beside text: each against transformers' own loss, step by step; metrics against the libraries that the field uses; what is published opens."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import normalizers

from finetune_crds.verdict import ExitCode
from finetune_trainer.errors import DataError
from finetune_trainer.objectives.spans import Answers
from finetune_trainer.objectives.tags import Entities, Tagging

from . import reference, tiny
from .runs import finish, journal, prepared, run
from .spawn import run_ranks
from .test_parity import order_of
from .test_prepare import prepared as prepared_of


def labelled(count: int, problem: str) -> list[dict[str, Any]]:
    rng = random.Random(5)
    rows = [rng.choices(tiny.WORDS, k=rng.randint(1, 9)) for _ in range(count)]
    kinds: dict[str, Any] = {
        "singleLabel": lambda words: "long" if len(words) > 4 else "short",
        "multiLabel": lambda words: [word for word in ("red", "one", "lamp") if word in words],
        "regression": lambda words: len(words) / 3,
    }
    return [{"text": " ".join(words), "label": kinds[problem](words)} for words in rows]


ROWS: dict[str, list[dict[str, Any]]] = {
    "token-classification": tiny.tagged_rows(40),
    "question-answering": tiny.question_rows(40),
    "singleLabel": labelled(40, "singleLabel"),
    "multiLabel": labelled(40, "multiLabel"),
    "regression": labelled(40, "regression"),
}


def make(folder: Path, model: Path, name: str, method: dict[str, Any], /, **spec: Any) -> Any:
    """A job on one of ROWS, evaluated on what it trains on."""
    data = tiny.write_rows(folder / "train.jsonl", ROWS[name])
    if name not in ("token-classification", "question-answering"):
        spec = {"task": "text-classification", "objective": {"classification": {"problem": name}}, **spec}
    training = {"maxSteps": 8, "batchSize": 8, "microBatchSize": 4, "learningRate": "5e-3", "sequenceLength": 128}
    spec = {"task": name, **spec, "training": training | spec.get("training", {})}
    dataset = {"evaluation": {"sources": [{"uri": f"file://{data}"}]}} | spec.pop("dataset", {})
    return tiny.job(folder, model, data, method=method, dataset=dataset, **spec)


@pytest.mark.parametrize("name", ROWS)
def test_losses_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Ten steps of BERT with the model's own loss of padded batches. A row of ours is one of theirs."""
    folder = tiny.make_encoder(tmp_path / "model")
    training = {"maxSteps": 10, "microBatchSize": 3, "learningRate": "1e-3", "warmupSteps": 2, "weightDecay": "0.1", "maxGradNorm": "0.5"}  # fmt: skip
    job = make(tmp_path, folder, name, {"full": {}}, training=training, dataset={"evaluation": {"fraction": "0"}})
    finish(job, tmp_path)
    rows = prepared(tmp_path)
    order = order_of(rows, 8, seed=42)
    steps = [[int(i) for sequence in step for i in sequence] for epoch in (0, 1) for step in order.epoch(epoch)]
    losses = reference.train_encoder(folder, job.spec.task, rows, steps, problem=job.spec.problem, seed=42, rate=1e-3, decay=0.1, clip=0.5)  # fmt: skip
    assert len(losses) == 10 and losses[-1] < losses[0]
    ours = [float.fromhex(loss) for loss in tiny.losses(tmp_path / "output")]
    np.testing.assert_allclose(ours, losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_metrics_do_not_depend_on_batches_and_ranks(tmp_path: Path, name: str) -> None:
    folder = tiny.make_encoder(tmp_path / "model")
    found = []
    for world, size in ((1, 8), (1, 1), (2, 3)):
        where = tmp_path / f"{world}-{size}"
        job = make(where, folder, name, {"full": {}}, training={"maxSteps": 1, "batchSize": 40, "microBatchSize": size})
        verdict = run_ranks(job, where, world)
        assert verdict.code == 0, verdict.message
        lines = journal(where)
        found.append([value for line in lines for key, value in sorted(line.items()) if key.startswith("eval_") and not key.endswith("_hex")])  # fmt: skip
    assert len(found[0]) >= 4
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_entities_are_counted_as_seqeval_does() -> None:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    rng = random.Random(6)
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    given, said = ([rng.choices(names, k=12) for _ in range(60)] for _ in range(2))
    found = Entities()
    for one, other in zip(said, given, strict=True):
        found.add(torch.zeros(()), len(other))
        found.add_tags(one, other)
    metrics = found.metrics()
    for name, theirs in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score), ("accuracy", accuracy_score)):  # fmt: skip
        assert math.isclose(metrics[f"eval_{name}"], theirs(given, said), abs_tol=1e-9), name


def blind_to_spaces(folder: Path) -> Any:
    """A tokenizer that makes nothing of white space, as BERT's."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tiny.make_encoder(folder / "model"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def test_words_that_are_not_read_count_as_missed(tmp_path: Path) -> None:
    """Of a text that is cut, and has a word without a token, a model that tags all that it reads rightly."""
    tokenizer = blind_to_spaces(tmp_path)
    row = {"tokens": ["a", " ", "bbb", "cc", "d"], "ner_tags": ["B-X", "O", "O", "B-X", "B-X"]}
    spec = {"task": "token-classification", "training": {"sequenceLength": 8}}
    rows = prepared_of(tmp_path, [row, row], tokenizer=tokenizer, **spec)
    assert rows.targets.tolist() == [3, 3] and rows.truncated.all()
    tagging = Tagging(tiny.job(tmp_path, tmp_path, tmp_path, **spec).spec, transformers.BertConfig(), rows)  # type: ignore[arg-type]
    found = tagging.accumulator()
    batch = tagging.batch(rows, [np.array([0, 1])], torch.device("cpu"))
    tagging.logits = lambda model, batch: torch.eye(len(rows.index.classes))[batch.targets]  # type: ignore[method-assign]
    tagging.measure(None, batch, found)  # type: ignore[arg-type]
    metrics = found.metrics()
    assert (metrics["eval_accuracy"], metrics["eval_precision"]) == (4 / 5, 1.0)
    assert math.isclose(metrics["eval_recall"], 2 / 3) and math.isclose(metrics["eval_f1"], 4 / 5)
    guess = tagging.guess(rows, np.array([0, 1]))
    assert guess and math.isclose(guess(np.array([0, 1])).metrics()["eval_recall"], 2 / 3)


@pytest.mark.parametrize(
    ("said", "answers", "exact", "overlap"),
    [
        ("the Eiffel Tower", ["Eiffel tower!"], 1.0, 1.0),
        ("a tower in Paris", ["tower of Paris", "Paris"], 0.0, 2 / 3),
        ("Rome", ["Paris"], 0.0, 0.0),
        ("Rome", [], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("", ["Paris"], 0.0, 0.0),
    ],
)
def test_answers_are_scored_as_in_squad(said: str, answers: list[str], exact: float, overlap: float) -> None:
    """Case, punctuation and articles do not count; the best of several answers does."""
    found = Answers()
    found.add_window((0, 1), 5.0, 1.0, said, answers)
    found.add_window((0, 1), 2.0, 3.0, "another window, less sure", answers)
    metrics = found.metrics()
    assert math.isclose(metrics["eval_exact_match"], exact) and math.isclose(metrics["eval_f1"], overlap)


def test_a_long_context_is_asked_in_windows_and_scored_once(tmp_path: Path) -> None:
    """The answer lies behind the first window; each question counts once."""
    folder = tiny.make_encoder(tmp_path / "model")
    context = " ".join([*["iron"] * 60, "red stone", *["iron"] * 20])
    start = context.index("red stone")
    row = {"question": "which stone", "context": context, "answers": {"text": ["red stone"], "answer_start": [start]}}
    ROWS["long"] = [row] * 4
    job = make(tmp_path, folder, "long", {"full": {}}, task="question-answering", objective=None,
               training={"maxSteps": 60, "learningRate": "3e-3", "batchSize": 16}, dataset={"evaluation": {"sources": [{"uri": f"file://{tmp_path}/train.jsonl"}]}})  # fmt: skip
    del ROWS["long"]
    verdict = finish(job, tmp_path)
    rows = prepared(tmp_path)
    windows = [row for row in range(len(rows.targets)) if rows.numbers[row] == 1 and rows.sources[row] == 0]
    assert len(windows) > 3 and int(rows.lengths.max()) <= 128
    pointed = [rows.labels_of(row) for row in windows]
    holding = [(row, at) for row, at in zip(windows, pointed, strict=True) if at[1]]
    assert 1 <= len(holding) < len(windows), "windows without the answer point at their first token"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    for row, (first, last) in holding:
        tokens = rows.tokens[int(rows.offsets[row]) :][int(first) : int(last) + 1]
        assert tokenizer.decode(tokens).strip() == "red stone"
    after = {metric.name: float(metric.value) for metric in (verdict.evaluation and verdict.evaluation.after) or []}
    assert after["eval_exact_match"] == after["eval_f1"] == 1.0


def test_a_context_without_a_token_is_named(tmp_path: Path) -> None:
    rows = [*tiny.question_rows(1), {"question": "q", "context": "  ", "answers": {"text": [], "answer_start": []}}]
    with pytest.raises(DataError, match=r"a.jsonl row 2: the context holds no token"):
        prepared_of(tmp_path, rows, tokenizer=blind_to_spaces(tmp_path), task="question-answering")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({"balanceClasses": True}, [48 / (2 * 36), 48 / (2 * 12)]), ({"classWeights": {"warm": "3"}}, [1.0, 3.0])],
)
def test_class_weights(tmp_path: Path, chosen: dict[str, Any], expected: list[float]) -> None:
    """As scikit-learn's "balanced"; they count in training and not in evaluation."""
    folder = tiny.make_encoder(tmp_path / "model")
    rows = [{"text": word, "label": "warm" if i % 4 == 0 else "cold"} for i, word in enumerate(tiny.WORDS[:12] * 4)]
    data = tiny.write_rows(tmp_path / "train.jsonl", rows)
    job = tiny.job(
        tmp_path, folder, data, task="text-classification", method={"full": {}}, objective={"classification": chosen},
        training={"maxSteps": 1, "batchSize": 48, "sequenceLength": 64},
        dataset={"evaluation": {"sources": [{"uri": f"file://{data}"}]}},
    )  # fmt: skip
    finish(job, tmp_path)
    lines = journal(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(42)
    plain = model(folder, num_labels=2).train()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = torch.tensor([int(row["label"] == "warm") for row in rows])
    with torch.no_grad():
        each, after = (
            torch.nn.functional.cross_entropy(one(**tokens).logits, labels, reduction="none")
            for one in (plain, model(tmp_path / "output"))
        )
    weighted = float((each * torch.tensor(expected)[labels]).mean())
    assert math.isclose(next(line["loss"] for line in lines if "loss" in line), weighted, abs_tol=1e-5)
    assert math.isclose(lines[-1]["eval_loss"], float(after.mean()), abs_tol=1e-5)


def test_a_metric_that_the_problem_does_not_have_is_named_before_the_first_step(tmp_path: Path) -> None:
    """Of a job that the API server took before it refused such."""
    folder = tiny.make_encoder(tmp_path / "model")
    verdict = run(make(tmp_path, folder, "regression", {"full": {}}, evaluation={"metric": "eval_f1"}), tmp_path)
    assert (verdict.code, verdict.step) == (ExitCode.USER_ERROR, 0)
    assert "evaluation.metric: eval_f1 is not measured of this job; choose one of eval_loss, eval_mse, eval_pearson" in verdict.message  # fmt: skip


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "tags": ("token-classification", {"tokens": ["a", "b"], "ner_tags": ["O"]}, "has 1 tags for 2 words"),
    "words": ("token-classification", {"tokens": "a b", "ner_tags": ["O", "O"]}, "must be a list of words"),
    "answers": ("question-answering", {"question": "q", "context": "c", "answers": ["c"]}, "as in SQuAD"),
    "answer": (
        "question-answering",
        {"question": "q", "context": "red lamp", "answers": {"text": ["lamp"], "answer_start": [0]}},
        "does not stand in the context",
    ),
    "question": (
        "question-answering",
        {"question": "q" * 200, "context": "red lamp", "answers": {"text": ["lamp"], "answer_start": [4]}},
        "the question leaves 0 tokens",
    ),
    "classes": ("multiLabel", {"text": "t", "label": "red"}, "must be a list of classes"),
    "number": ("regression", {"text": "t", "label": "high"}, "must be a number"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_rows_are_named(tmp_path: Path, case: str) -> None:
    name, row, sentence = MISTAKES[case]
    folder = tiny.make_encoder(tmp_path / "model")
    job = make(tmp_path, folder, name, {"full": {}})
    tiny.write_rows(tmp_path / "train.jsonl", [*ROWS[name][:3], row])
    verdict = run(job, tmp_path)
    assert verdict.code == ExitCode.DATA_ERROR
    assert sentence in verdict.message and "row 4" in verdict.message
