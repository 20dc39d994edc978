"""The final word fits where the kubelet keeps it."""

import pytest
from pydantic import ValidationError

from finetune_crds.v1alpha1 import Metric, OutputStatus
from finetune_crds.verdict import MESSAGE_MAX, OUTCOMES, ExitCode, Verdict


def test_every_code_has_an_outcome_and_every_failure_advice() -> None:
    assert set(OUTCOMES) == set(ExitCode)
    silent = [code.name for code, outcome in OUTCOMES.items() if not outcome.next_step]
    assert silent == ["FINISHED", "STOPPED", "PEER_LOST", "FENCED"]


@pytest.mark.parametrize("message", ["", "x" * 1500, "ü" * 1500])
@pytest.mark.parametrize("metrics", [0, 5, 500])
def test_a_message_fits_and_keeps_what_matters(message: str, metrics: int) -> None:
    verdict = Verdict(
        code=64, message=message, step=7, metrics=[Metric(name=f"m{i}", value="1.0") for i in range(metrics)]
    )
    text = verdict.to_message()
    assert len(text.encode()) <= MESSAGE_MAX
    back = Verdict.model_validate_json(text)
    assert (back.code, back.step) == (64, 7)
    assert back.message == message or back.message.endswith("…")


def test_a_message_fits_whatever_the_place_is_called() -> None:
    place = "s3://bucket/" + "p" * 980
    reports = dict.fromkeys(
        ("data_report", "data_report_json", "evaluation_report", "evaluation_report_json"), f"{place}/report"
    )
    text = Verdict(code=0, output=OutputStatus(uri=place, digest="sha256:0", **reports)).to_message()
    assert len(text.encode()) <= MESSAGE_MAX
    found = Verdict.model_validate_json(text).output
    assert found and (found.uri, found.data_report) == (place, f"{place}/report")


def test_links_to_numbers_go_before_what_is_told_nowhere_else() -> None:
    place = "s3://bucket/" + "p" * 700
    links = dict.fromkeys(("data_report", "data_report_json", "evaluation_report", "evaluation_report_json"), place)
    metrics = [Metric(name=f"eval_{i}", value="1") for i in range(20)]
    told = Verdict(code=0, output=OutputStatus(uri=place, digest="sha256:0", **links), metrics=metrics)
    found = Verdict.model_validate_json(told.to_message())
    assert found.output and not found.output.data_report_json
    assert found.metrics == metrics


@pytest.mark.parametrize(
    "words",
    [
        {"step": 10**30},
        {"inputs": {"tokens": 2**53}},
        {"checkpoints": {"latest": {"step": 1, "uri": "pvc://c/p", "digest": "sha256:0", "time": "yesterday"}}},
    ],
)
def test_what_the_api_server_would_refuse_in_status_is_no_verdict(words: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Verdict.model_validate({"code": 0, **words})
