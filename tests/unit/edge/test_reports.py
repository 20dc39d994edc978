"""What is taken from a body and what is refused: status may hold no training text, and the API server must take all of it."""

import json
from typing import Any

import pytest

from finetune_crds.progress import BODY_MAX
from finetune_crds.v1alpha1 import METRICS_MAX, Metric
from finetune_operator import figures
from finetune_operator.progress_server import reports
from finetune_operator.progress_server.refusals import Refused

from .builders import checkpoint, ours, stock

TEXT = "The patient said"


def refusal(body: object) -> Refused:
    with pytest.raises(Refused) as caught:
        reports.parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert TEXT not in caught.value.message, "a refusal tells the field, never what it held"
    return caught.value


def changed(step: int, **fields: Any) -> dict[str, Any]:
    return ours(step, **fields)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'"\xff"', "body"),
        ({}, "trainerStatus"),
        ({"trainerStatus": None}, "trainerStatus"),
        (stock(101), "trainerStatus.progressPercentage"),
        (stock(-1), "trainerStatus.progressPercentage"),
        (stock(1, eta=-1), "trainerStatus.estimatedRemainingSeconds"),
        ({"trainerStatus": {"metrics": [{"name": "loss", "value": 1.5}]}}, "trainerStatus.metrics.0.value"),
        ({"trainerStatus": {"metrics": [{"name": "loss"}]}}, "trainerStatus.metrics.0.value"),
        (stock(1, {f"m{i}": i for i in range(257)}), "trainerStatus.metrics"),
        (ours(1, stage=TEXT), "finetune.stage"),
        (changed(-1), "finetune.step"),
        (changed(2**63), "finetune.step"),
        (changed(1, total=2**63), "finetune.totalSteps"),
        (changed(1, epoch=TEXT), "finetune.epoch"),
        (changed(1, tokensPerSecond=-5), "finetune.tokensPerSecond"),
        (changed(1, invented=True), "finetune.invented"),
        (changed(1, checkpoints={"latest": checkpoint(1) | {"uri": TEXT}}), "finetune.checkpoints.latest.uri"),
        (changed(1, checkpoints={"best": checkpoint(1) | {"digest": TEXT}}), "finetune.checkpoints.best.digest"),
        (changed(1, checkpoints={"latest": checkpoint(1) | {"time": "noon"}}), "finetune.checkpoints.latest.time"),
        (changed(1, checkpoints={"latest": checkpoint(1) | {"step": -1}}), "finetune.checkpoints.latest.step"),
        (
            changed(1, checkpoints={"best": checkpoint(1) | {"metric": {"name": "eval_loss", "value": TEXT}}}),
            "finetune.checkpoints.best.metric",
        ),
        (changed(1, inputs={"modelDigest": TEXT}), "finetune.inputs.modelDigest"),
        (changed(1, inputs={"rows": 2**63}), "finetune.inputs.rows"),
        (changed(1, evaluation={"before": [{"name": "x" * 65, "value": "1"}]}), "finetune.evaluation.before.0.name"),
    ],
)
def test_body_that_breaks_the_contract_is_refused_with_its_field(body: object, field: str) -> None:
    refused = refusal(body)
    assert refused.code == 400
    assert field in refused.message


def test_long_body_is_refused() -> None:
    assert refusal(b" " * (BODY_MAX + 1)).code == 413


def test_unknown_fields_of_other_trainers_pass() -> None:
    body = stock(5) | {"vendor": {"a": 1}}
    body["trainerStatus"]["phase"] = "warm-up"
    assert reports.parse(json.dumps(body).encode()).trainerStatus.progressPercentage == 5


def test_only_numbers_with_plain_names_are_metrics() -> None:
    given = {
        "loss": "1.23456789012345",
        "eval/f1-macro_2.x": "7",
        "total_flos": "1.5e15",
        "grad_norm": "nan",
        "peak": "inf",
        "sample": TEXT,
        TEXT: "1",
        "x" * 65: "1",
        "truth": "True",
        "hex": "0x10",
        "none": "",
    }
    parsed = reports.parse(json.dumps(stock(1, dict(given))).encode())
    assert {m.name: m.value for m in figures.metrics(parsed.trainerStatus.metrics)} == {
        "loss": "1.23457",
        "eval/f1-macro_2.x": "7",
        "total_flos": "1.5e+15",
        "grad_norm": "nan",
        "peak": "inf",
    }


def test_metrics_of_one_name_become_one_with_the_last_value() -> None:
    """The API server refuses a whole status with duplicate keys in a list."""
    twice = [Metric(name="loss", value="2"), Metric(name="loss", value="1")]
    assert figures.metrics(twice) == [Metric(name="loss", value="1")]


def test_hundreds_of_metrics_keep_those_that_people_look_for() -> None:
    names = [f"layer{i}/norm" for i in range(200)] + ["eval_accuracy", "learning_rate", "loss", "eval_loss"]
    kept = [m.name for m in figures.leading(Metric(name=n, value="1") for n in names)]
    assert len(kept) == METRICS_MAX
    assert kept[:5] == ["loss", "eval_loss", "eval_accuracy", "learning_rate", "layer0/norm"]
    later = [Metric(name=name, value="2") for name in ("zz", "loss")]
    both = figures.latest(figures.leading(Metric(name=n, value="1") for n in names), later)
    assert len(both) == METRICS_MAX
    assert {m.name for m in both if m.value == "2"} == {"zz", "loss"}, "what was told last has room"
