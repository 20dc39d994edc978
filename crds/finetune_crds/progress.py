"""The progress contract: what a pod POSTs and what it is answered.

`trainerStatus` is what transformers' KubeflowCallback sends (Kubeflow Trainer proposal 2779), so an unmodified script reports;
`finetune` is what our trainer adds. One POST an interval, from the first rank; the token decides whose progress it is.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .v1alpha1 import ApiModel, CheckpointsStatus, EvaluationStatus, Inputs

BODY_MAX = 65_536
"""Bytes; a longer body is answered 413."""
PATH = "/v1alpha1/namespaces/{namespace}/finetunejobs/{name}/progress"


class MetricReport(BaseModel):
    """One metric as a stock callback sends it."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    value: Annotated[str, Field(max_length=4096)]


class TrainerStatus(BaseModel):
    """Kubeflow Trainer's part."""

    model_config = ConfigDict(extra="ignore")

    lastUpdatedTime: str | None = None
    progressPercentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimatedRemainingSeconds: Annotated[int, Field(ge=0)] | None = None
    metrics: Annotated[list[MetricReport], Field(max_length=256)] = []


class RunReport(ApiModel):
    """Our trainer's part."""

    attempt: int
    """FINETUNE_ATTEMPT."""
    stage: Literal["Preparing", "Loading", "Training", "Evaluating", "Saving", "Publishing", "Finished"]
    """What it is doing."""
    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps to do; 0 while unknown."""
    epoch: str | None = None
    """Passes done."""
    tokens_per_second: int | None = None
    """Non-padding input tokens a second over all ranks."""
    first_step: int = 0
    """Step at which this run started."""
    checkpoints: CheckpointsStatus | None = None
    """Latest and best."""
    inputs: Inputs | None = None
    """Resolved inputs, once known."""
    evaluation: EvaluationStatus | None = None
    """Before and after, once known."""
    longest_save_seconds: int | None = None
    """Longest save so far: pods of the next attempt get at least twice this to save."""


class ProgressReport(BaseModel):
    """The body of a POST."""

    model_config = ConfigDict(extra="ignore")

    trainerStatus: TrainerStatus
    finetune: RunReport | None = None


class ProgressReply(ApiModel):
    """The answer to an accepted POST (200). A stock callback does not read it.

    409 means that another run has taken this one's place: stop at once and commit nothing. 401 and 403: not your job; 413, 429: later.
    """

    action: Literal["continue", "stop"]
    """stop: save a checkpoint and exit with STOPPED."""
    reason: str | None = None
    """Why to stop: Suspended or DeadlineExceeded."""
