"""Reports as trainers send them, and runs that send them."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.progress_server import reports
from finetune_operator.progress_server.runs import Run
from finetune_operator.progress_server.statuses import Reported

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def run(*, attempt: int = 1, pod: str = "support-bot-0", created: datetime = NOON - timedelta(minutes=1)) -> Run:
    return Run("team", "support-bot", "uid-1", attempt, pod, created, created, stop="")


def stock(percent: int | None, metrics: dict[str, object] | None = None, eta: int | None = None) -> dict[str, Any]:
    """What transformers' KubeflowCallback sends."""
    status: dict[str, Any] = {"lastUpdatedTime": "2026-01-31T12:00:00.123456+00:00"}
    if percent is not None:
        status["progressPercentage"] = percent
    if eta is not None:
        status["estimatedRemainingSeconds"] = eta
    if metrics:
        status["metrics"] = [{"name": name, "value": str(value)} for name, value in metrics.items()]
    return {"trainerStatus": status}


def ours(
    step: int,
    total: int = 300,
    *,
    stage: str = "Training",
    metrics: dict[str, object] | None = None,
    eta: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What our trainer sends."""
    part = {"attempt": 1, "stage": stage, "step": step, "totalSteps": total, **more}
    return {**stock(None, metrics, eta), "finetune": part}


def checkpoint(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "uri": f"pvc://checkpoints/support-bot/uid-1/sha256-ab/step-{step:08d}",
        "digest": "sha256:" + "ab" * 32,
        "time": "2026-01-31T12:00:00Z",
    }


def reported(body: dict[str, Any], *, by: Run | None = None, at: datetime = NOON) -> Reported:
    return Reported(by or run(), reports.parse(json.dumps(body).encode()), at)
