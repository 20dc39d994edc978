"""Report + status -> status, as a table of stories."""

from datetime import timedelta
from typing import Any

import pytest

from finetune_crds.v1alpha1 import FineTuneJobStatus
from finetune_operator.progress_server import statuses

from .builders import NOON, checkpoint, ours, reported, run, stock


def applied(status: dict[str, Any], body: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Status after a report that must be taken; valid for the API by its own models."""
    after = statuses.advance(status, reported(body, **more))
    assert after is not None
    FineTuneJobStatus.model_validate(after)
    return status | after


def refused(status: dict[str, Any], body: dict[str, Any], **more: Any) -> bool:
    return statuses.advance(status, reported(body, **more)) is None


def test_stock_script_from_begin_to_end() -> None:
    begun = applied({}, stock(0, {"total_steps": 300}))
    assert begun["progress"] == {
        "attempt": 1,
        "pod": "support-bot-0",
        "stage": "Training",
        "totalSteps": 300,
        "percentage": 0,
        "display": "0 %",
        "lastReportTime": "2026-01-31T12:00:00Z",
    }
    assert begun["metrics"] == []
    logged = {"loss": 2.5, "learning_rate": 1e-4, "current_step": 120, "total_steps": 300, "current_epoch": 1.25}
    middle = applied(begun, stock(40, logged, eta=90), at=NOON + timedelta(seconds=60))
    assert middle["progress"]["display"] == "40 % (120/300)"
    assert middle["progress"]["step"] == 120
    assert middle["progress"]["epoch"] == "1.25"
    assert middle["progress"]["estimatedCompletionTime"] == "2026-01-31T12:02:30Z"
    assert {m["name"]: m["value"] for m in middle["metrics"]} == {"loss": "2.5", "learning_rate": "0.0001"}
    end = applied(middle, stock(100, {"train_loss": 1.5}, eta=0), at=NOON + timedelta(seconds=150))
    assert end["progress"]["display"] == "100 %"
    assert (end["progress"]["step"], end["progress"]["totalSteps"]) == (120, 300)
    assert {m["name"] for m in end["metrics"]} == {"loss", "learning_rate", "train_loss"}, "what was known stays"


def test_own_trainer() -> None:
    status = applied(
        {},
        ours(
            120,
            metrics={"loss": "0.5"},
            eta=3600,
            epoch="1.20",
            tokensPerSecond=5000,
            inputs={"rows": 10, "datasetDigest": "sha256:00"},
            checkpoints={"latest": checkpoint(100)},
        ),
    )
    assert status["progress"]["display"] == "40 % (120/300)"
    assert status["progress"]["epoch"] == "1.2"
    assert status["progress"]["estimatedCompletionTime"] == "2026-01-31T13:00:00Z"
    later = applied(status, ours(300, stage="Finished", eta=0, checkpoints={"best": checkpoint(200)}))
    assert later["progress"]["display"] == "100 % (300/300)"
    assert "estimatedCompletionTime" not in later["progress"]
    assert later["inputs"] == {"rows": 10, "datasetDigest": "sha256:00"}, "an apply that omits a field deletes it"
    assert later["checkpoints"] == {"latest": checkpoint(100), "best": checkpoint(200)}


@pytest.mark.parametrize("remaining", [0, 10**30])
def test_any_remaining_time_gives_a_date_that_the_api_takes(remaining: int) -> None:
    status = applied({}, stock(1, eta=remaining))
    assert status["progress"]["estimatedCompletionTime"] >= "2026-01-31T12:00:00Z"


def test_evaluation_carries_numbers_only() -> None:
    metrics = [{"name": "eval_loss", "value": "1.50000001"}, {"name": "sample", "value": "The patient said"}]
    status = applied({}, ours(0, evaluation={"before": metrics}))
    assert status["evaluation"] == {"before": [{"name": "eval_loss", "value": "1.5"}]}


BEFORE = applied({}, ours(120, metrics={"loss": "0.5"}, checkpoints={"latest": checkpoint(100)}))
NEW_POD = run(pod="support-bot-0-new", created=NOON + timedelta(seconds=40))
OLD_POD = run(pod="support-bot-0-old", created=NOON - timedelta(hours=1))


@pytest.mark.parametrize(
    ("body", "by", "expected"),
    [
        (ours(121), run(), 121),
        (ours(120, stage="Saving"), run(), 120),
        (ours(119), run(), None),
        (ours(5), run(attempt=2, pod="second"), 5),
        (ours(500, 1000), run(attempt=0), None),
        (ours(101), NEW_POD, 101),
        (ours(119), OLD_POD, None),
        (stock(39, {"current_step": 119, "total_steps": 300}), run(), None),
        (stock(10), run(), None),
    ],
    ids=[
        "a step further",
        "same step, another stage",
        "overtaken on the way",
        "next attempt starts anew",
        "former attempt, late",
        "replaced pod starts at its checkpoint",
        "replaced pod, late",
        "stock, overtaken",
        "stock, percentage only, overtaken",
    ],
)
def test_order_is_attempt_run_step(body: dict[str, Any], by: Any, expected: int | None) -> None:
    after = statuses.advance(BEFORE, reported(body, by=by, at=NOON + timedelta(seconds=50)))
    assert (after["progress"]["step"] if after else None) == expected


def test_next_attempt_keeps_checkpoints_unless_the_job_was_edited() -> None:
    same = [{"number": 1, "specDigest": "a"}, {"number": 2, "specDigest": "a"}]
    edited = [{"number": 1, "specDigest": "a"}, {"number": 2, "specDigest": "b"}]
    second = run(attempt=2, pod="second")
    assert applied_raw(BEFORE | {"attempts": same}, ours(1), second)["checkpoints"] == {"latest": checkpoint(100)}
    assert "checkpoints" not in applied_raw(BEFORE | {"attempts": edited}, ours(1), second)
    assert applied_raw(BEFORE | {"attempts": same}, ours(1), second)["metrics"] == [], "a new attempt has no loss yet"


def applied_raw(status: dict[str, Any], body: dict[str, Any], by: Any) -> dict[str, Any]:
    after = statuses.advance(status, reported(body, by=by))
    assert after is not None
    return after


@pytest.mark.parametrize(
    ("body", "by", "urgent"),
    [
        (ours(121, metrics={"loss": "0.4"}), run(), False),
        (ours(121, stage="Evaluating"), run(), False),
        (ours(121, checkpoints={"latest": checkpoint(100)}), run(), False),
        (ours(121, checkpoints={"latest": checkpoint(120)}), run(), True),
        (ours(121, evaluation={"before": [{"name": "eval_loss", "value": "1"}]}), run(), True),
        (ours(300, stage="Finished"), run(), True),
        (stock(100), run(), True),
        (ours(1), run(attempt=2, pod="second"), True),
        (ours(100), NEW_POD, True),
    ],
    ids=["step", "stage", "known checkpoint", "checkpoint", "evaluation", "end", "stock end", "attempt", "new run"],
)
def test_what_must_not_wait(body: dict[str, Any], by: Any, urgent: bool) -> None:
    after = statuses.advance(BEFORE, reported(body, by=by, at=NOON + timedelta(seconds=50)))
    assert after is not None
    assert statuses.is_urgent(BEFORE, after) is urgent


def test_first_report_is_urgent() -> None:
    after = statuses.advance({}, reported(stock(0)))
    assert after is not None
    assert statuses.is_urgent({}, after)


def test_first_step_of_a_stock_script_is_urgent() -> None:
    """It tells none at its end, which another replica may write before the rest of the interval is over."""
    begun = applied({}, stock(0, {"total_steps": 30}))
    first, second = (
        statuses.advance(begun, reported(stock(percent, told))) for percent, told in ((0, {}), (3, {"current_step": 1}))
    )
    assert first is not None and not statuses.is_urgent(begun, first)
    assert second is not None and statuses.is_urgent(begun, second)


def test_fold_keeps_what_only_the_earlier_report_knew() -> None:
    earlier = reported(ours(10, metrics={"loss": "3", "eval_loss": "2"}, checkpoints={"latest": checkpoint(10)}))
    later = reported(ours(11, metrics={"loss": "1"}), at=NOON + timedelta(seconds=5))
    for folded in (statuses.fold(earlier, later), statuses.fold(later, earlier)):
        after = statuses.advance({}, folded)
        assert after is not None
        assert after["progress"]["step"] == 11
        assert after["checkpoints"] == {"latest": checkpoint(10)}
        assert {m["name"]: m["value"] for m in after["metrics"]} == {"loss": "1", "eval_loss": "2"}
        assert after["progress"]["lastReportTime"] == "2026-01-31T12:00:05Z"


def test_fold_of_two_runs_is_the_later_one() -> None:
    earlier, later = reported(ours(10)), reported(ours(5), by=NEW_POD)
    assert statuses.fold(earlier, later) is later


def test_longest_save_is_remembered() -> None:
    """The next pod's grace period is made from it."""
    slow = applied({}, ours(10, checkpoints={"latest": checkpoint(10)}, longestSaveSeconds=45))
    quick = applied(slow, ours(20, longestSaveSeconds=3))
    assert quick["checkpoints"] == {"latest": checkpoint(10), "longestSaveSeconds": 45}


def test_fold_takes_the_end_of_a_stock_script_which_tells_no_step() -> None:
    middle = reported(stock(50, {"current_step": 15, "total_steps": 30, "loss": 1}))
    after = statuses.advance({}, statuses.fold(middle, reported(stock(100, {"loss": 0.5}))))
    assert after is not None
    assert (after["progress"]["percentage"], after["progress"]["step"]) == (100, 15)
    assert after["metrics"] == [{"name": "loss", "value": "0.5"}]
