"""The baseline of a head that is new: always the same answer, against scikit-learn's dummies; and which heads are new."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_squared_error

from finetune_crds.verdict import ExitCode, Verdict
from finetune_trainer import train
from finetune_trainer.modelling.models import _same_classes

from . import tiny
from .spawn import run_ranks

QUICK = {"maxSteps": 1, "batchSize": 8, "sequenceLength": 64, "learningRate": "1e-3"}
CLASSES = ("ham", "spam", "news")
LABELS = ("red", "one", "lamp")


def labelled(count: int, seed: int, problem: str = "singleLabel") -> list[dict[str, Any]]:
    rng = random.Random(seed)
    kinds: dict[str, Any] = {
        "singleLabel": lambda: rng.choices(CLASSES, (2, 5, 1))[0],
        "multiLabel": lambda: [name for name, share in zip(LABELS, (0.8, 0.3, 0.6), strict=True) if rng.random() < share],
        "regression": lambda: round(rng.gauss(3, 2), 3),
    }  # fmt: skip
    return [{"text": " ".join(rng.choices(tiny.WORDS, k=4)), "label": kinds[problem]()} for _ in range(count)]


def make(folder: Path, model: Path, rows: Any, held: Any, /, **spec: Any) -> Any:
    data, other = (tiny.write_rows(folder / f"{name}.jsonl", one) for name, one in (("train", rows), ("held", held)))
    dataset = {"evaluation": {"sources": [{"uri": f"file://{other}"}]}}
    training = QUICK | spec.pop("training", {})
    return tiny.job(folder, model, data, dataset=dataset, training=training, **({"task": "text-classification"} | spec))


def run(job: Any, folder: Path, **options: Any) -> Verdict:
    verdict = train.run(job, tiny.context(job, folder / "scratch", **options))
    assert verdict.code in (0, ExitCode.GATE_FAILED), verdict.message
    return verdict


def before(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "output/finetune.json").read_text())
    assert found["baseline"] == "majority"
    return dict(found["before"])


def test_of_classes(tmp_path: Path) -> None:
    """Accuracy, macro F1 and loss, of slices too, on one rank and on two."""
    rows, held = labelled(50, 1), labelled(21, 2)
    for i, row in enumerate(held):
        row["region"] = ("eu", "us")[i % 2]
    model = tiny.make_encoder(tmp_path / "model")
    evaluation = {"slices": [{"name": "eu", "column": "region", "value": "eu"}]}
    job = make(tmp_path, model, rows, held, evaluation=evaluation)
    verdict = run(job, tmp_path)
    assert verdict.evaluation and verdict.evaluation.baseline == "majority"

    y, t = [row["label"] for row in rows], np.array([row["label"] for row in held])
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((50, 1)), y)
    for suffix, chosen in (("", t), (".eu", t[::2])):
        x = np.zeros((len(chosen), 1))
        expected = {
            "eval_accuracy": accuracy_score(chosen, dummy.predict(x)),
            "eval_f1": f1_score(chosen, dummy.predict(x), average="macro", zero_division=0),
            "eval_loss": log_loss(chosen, dummy.predict_proba(x), labels=dummy.classes_),
        }
        found = before(tmp_path)
        for name, value in expected.items():
            assert found[name + suffix] == pytest.approx(value, abs=1e-9), name + suffix
    assert run_ranks(make(tmp_path / "two", model, rows, held, evaluation=evaluation), tmp_path / "two", 2).code == 0
    assert before(tmp_path / "two") == before(tmp_path)


def test_of_several_labels_and_of_numbers(tmp_path: Path, llama: Path) -> None:
    for problem in ("multiLabel", "regression"):
        rows, held = labelled(50, 1, problem), labelled(20, 2, problem)
        folder = tmp_path / problem
        run(make(folder, llama, rows, held, objective={"classification": {"problem": problem}}), folder)
        found, x = before(folder), np.zeros((50, 1))
        if problem == "regression":
            y, t = ([row["label"] for row in each] for each in (rows, held))
            guessed = DummyRegressor().fit(x, y).predict(x[:20])
            assert found["eval_mse"] == found["eval_loss"] == pytest.approx(mean_squared_error(t, guessed), rel=1e-6)
            assert found["eval_pearson"] == 0
        else:
            y, t = (np.array([[name in row["label"] for name in sorted(LABELS)] for row in each], int) for each in (rows, held))  # fmt: skip
            dummy = DummyClassifier(strategy="prior").fit(x, y)
            guessed = dummy.predict(x[:20])
            given = (np.array(t) | guessed).any(axis=0)
            assert found["eval_accuracy"] == pytest.approx(accuracy_score(t, guessed))
            assert found["eval_f1"] == pytest.approx(
                f1_score(t[:, given], guessed[:, given], average="macro", zero_division=0)
            )
            losses = [log_loss(t[:, i], one, labels=[0, 1]) for i, one in enumerate(dummy.predict_proba(x[:20]))]
            assert found["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-9)


def test_of_tags(tmp_path: Path) -> None:
    rows, held = tiny.tagged_rows(60)[:40], tiny.tagged_rows(60)[40:]
    run(make(tmp_path, tiny.make_encoder(tmp_path / "model"), rows, held, task="token-classification"), tmp_path)
    y, t = ([tag for row in each for tag in row["ner_tags"]] for each in (rows, held))
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((len(y), 1)), y)
    x = np.zeros((len(t), 1))
    found = before(tmp_path)
    assert found["eval_accuracy"] == pytest.approx(accuracy_score(t, dummy.predict(x)))
    assert found["eval_loss"] == pytest.approx(log_loss(t, dummy.predict_proba(x), labels=dummy.classes_), abs=1e-9)
    assert found["eval_f1"] == 0, "O is no entity"


def test_a_class_that_training_lacks_costs_much_but_not_everything(tmp_path: Path, llama: Path) -> None:
    rows = [{"text": "red", "label": name} for name in ("ham",) * 6 + ("spam",) * 2]
    run(make(tmp_path, llama, rows, [{"text": "red", "label": "news"}]), tmp_path)
    assert before(tmp_path)["eval_loss"] == pytest.approx(-np.log(0.5 / 8.5))


def with_head(folder: Path, names: list[str]) -> Path:
    """An encoder with a head that was trained, as far as anybody can tell."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = tiny.make_encoder(folder / "plain")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        plain, num_labels=len(names), id2label=dict(enumerate(names))
    )
    model.save_pretrained(folder / "with")
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder / "with")
    return folder / "with"


@pytest.mark.parametrize(
    ("names", "baseline"),
    [(["ham", "spam", "news"], "model"), (["joy", "anger", "fear"], "majority")],
)
def test_a_head_that_came_trained_for_these_classes_is_measured(
    tmp_path: Path, names: list[str], baseline: str
) -> None:
    model = with_head(tmp_path, names)
    verdict = run(make(tmp_path, model, labelled(30, 1), labelled(12, 2), training={"maxSteps": 1}), tmp_path)
    assert verdict.evaluation and verdict.evaluation.baseline == baseline


def test_a_head_of_numbers_and_one_of_a_continued_adapter_are_not_new(tmp_path: Path) -> None:
    assert _same_classes(["LABEL_0", "LABEL_1"], ["0", "1"])
    assert not _same_classes(["LABEL_0", "LABEL_1"], ["ham", "spam"])
    assert not _same_classes(["spam", "ham"], ["ham", "spam"])
    model = tiny.make_encoder(tmp_path / "model")
    first = make(tmp_path / "first", model, labelled(30, 1), labelled(12, 2), method={"lora": {}})
    assert run(first, tmp_path / "first").evaluation.baseline == "majority"  # type: ignore[union-attr]
    on = make(
        tmp_path / "on", model, labelled(30, 1), labelled(12, 2), method={"lora": {}},
        model={"adapter": {"uri": f"file://{tmp_path}/first/output"}},
    )  # fmt: skip
    verdict = run(on, tmp_path / "on")
    assert verdict.evaluation and verdict.evaluation.baseline == "model"
    after = json.loads((tmp_path / "first/output/finetune.json").read_text())["after"]
    found = json.loads((tmp_path / "on/output/finetune.json").read_text())["before"]
    assert found["eval_loss"] == pytest.approx(after["eval_loss"], abs=1e-5)


def test_gates_regress_from_the_majority(tmp_path: Path, llama: Path) -> None:
    """What was learned is the opposite of what holds, so the result is worse than a coin, which the majority is here."""
    rows = [{"text": text, "label": label} for text, label in (("red red", "ham"), ("iron", "spam")) * 20]
    held = [{"text": text, "label": label} for text, label in (("red red", "spam"), ("iron", "ham")) * 5]
    job = make(
        tmp_path, llama, rows, held, training={"maxSteps": 10, "learningRate": "5e-3"},
        evaluation={"gates": [{"metric": "eval_loss", "maxRegression": "0.01"}]},
    )  # fmt: skip
    verdict = run(job, tmp_path)
    assert verdict.code == ExitCode.GATE_FAILED
    assert f"went from {np.log(2):.4g} to" in verdict.message and "worse by more than maxRegression" in verdict.message
