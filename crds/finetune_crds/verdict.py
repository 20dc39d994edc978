"""How a run ended: the table of exit codes, and the termination message that explains one.

The supervisor (PID 1) writes the message and exits with the code; the Job's podFailurePolicy is built from the table; the operator
reads both. A Job that is Complete without a FINISHED verdict is not a success.
"""

import re
from collections.abc import Iterator
from enum import IntEnum
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from .v1alpha1 import (
    ApiModel,
    Cause,
    CheckpointsStatus,
    EvaluationStatus,
    Inputs,
    Metric,
    OutputStatus,
    PreflightReport,
)

MESSAGE_MAX = 4096
"""Bytes of a termination message that the kubelet keeps."""


INTEGER_MAX = 2**53 - 1
"""Largest integer that every JSON reader keeps."""
_TIME = re.compile(r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


class ExitCode(IntEnum):
    """What a training container exits with."""

    FINISHED = 0
    USER_ERROR = 64
    DATA_ERROR = 65
    DIVERGED = 66
    OUT_OF_GPU_MEMORY = 67
    PROGRAM_FAILED = 68
    GATE_FAILED = 69
    INTERNAL_ERROR = 70
    STORAGE_ERROR = 74
    STOPPED = 75
    PEER_LOST = 76
    FENCED = 77


Policy = Literal["Ignore", "FailJob", "Count"]


class Outcome(NamedTuple):
    """What follows from an exit code."""

    cause: Cause | None
    policy: Policy
    """Ignore: the pod is replaced inside the same Job, for free. FailJob: never retried. Count: against spec.retries."""
    next_step: str
    """What a user can do."""


OUTCOMES: dict[ExitCode, Outcome] = {
    ExitCode.FINISHED: Outcome(None, "FailJob", ""),
    ExitCode.USER_ERROR: Outcome(
        "UserError",
        "FailJob",
        "Correct what the message names, and apply the manifest again; if it stays as it is, set the annotation finetune.dev/retry.",
    ),
    ExitCode.DATA_ERROR: Outcome(
        "DataError",
        "FailJob",
        "Correct the rows, or dataset.columns in the manifest, and apply it again; if it stays as it is, set the annotation finetune.dev/retry.",
    ),
    ExitCode.DIVERGED: Outcome(
        "Diverged",
        "FailJob",
        "Lower training.learningRate or lengthen the warm-up; the last checkpoint is untouched. Then apply again.",
    ),
    ExitCode.OUT_OF_GPU_MEMORY: Outcome(
        "OutOfGpuMemory",
        "FailJob",
        "Set training.gradientCheckpointing: true, set or lower training.microBatchSize (with another number training begins anew) or training.sequenceLength, use method.lora or method.qlora, or training.optimizer.adamw with bits: 8 or paged: true; more GPUs help where the trained weights are large (method.full). Then apply again.",
    ),
    ExitCode.PROGRAM_FAILED: Outcome(
        "ProgramFailed", "Count", "Read the program's log; its exit code is in status.failure.exitCode."
    ),
    ExitCode.GATE_FAILED: Outcome(
        "GateFailed",
        "FailJob",
        "Nothing was published; the checkpoints are there. Train otherwise, or change evaluation.gates, and apply again: with the same training it goes on from the last checkpoint.",
    ),
    ExitCode.INTERNAL_ERROR: Outcome(
        "InternalError", "Count", "This is a fault of the trainer: please report it with status.failure.evidence."
    ),
    ExitCode.STORAGE_ERROR: Outcome(
        "StorageError", "Count", "Check space, permissions and reachability of the location that the message names."
    ),
    ExitCode.STOPPED: Outcome("Disruption", "Ignore", ""),
    ExitCode.PEER_LOST: Outcome("PeerLost", "Ignore", ""),
    ExitCode.FENCED: Outcome("Fenced", "FailJob", ""),
}
"""Cause, policy and advice of each code. A code that is not here (137 of the kernel's out-of-memory killer, say) counts."""


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _integers(each)


class Evidence(ApiModel):
    """Where it went wrong, without values."""

    type: Annotated[str, Field(max_length=128)]
    """Type of the error."""
    file: Annotated[str, Field(max_length=256)] | None = None
    """Source file."""
    line: int | None = None
    """Line in it."""


class Verdict(ApiModel):
    """The termination message: the supervisor's record of a run, and its final word when the progress server was away."""

    code: int
    """Exit code."""
    message: Annotated[str, Field(max_length=1500)] = ""
    """What happened, naming the field or object. No training text."""
    evidence: Evidence | None = None
    """Where."""
    first_step: int = 0
    """Step at which the run started."""
    step: int = 0
    """Last optimizer step done."""
    total_steps: int = 0
    """Optimizer steps to do; 0 when never known."""
    tokens_per_second: int | None = None
    """Mean over the run."""
    metrics: list[Metric] = []
    """Latest values, the important ones first."""
    checkpoints: CheckpointsStatus | None = None
    """Latest and best."""
    inputs: Inputs | None = None
    """Resolved inputs."""
    evaluation: EvaluationStatus | None = None
    """Before and after."""
    output: OutputStatus | None = None
    """The result; required for FINISHED of our trainer."""
    longest_save_seconds: int | None = None
    """Longest save."""
    preflight: PreflightReport | None = None
    """Of a preflight, what it found; nothing was trained."""

    @model_validator(mode="after")
    def _fits_into_status(self) -> "Verdict":
        """A program of the user's own writes it too; what the API server refuses would keep status from ever being written."""
        checkpoints = (self.checkpoints.latest, self.checkpoints.best) if self.checkpoints else ()
        if any(each and not _TIME.fullmatch(each.time) for each in checkpoints):
            raise ValueError("the time of a checkpoint must look like 2026-01-31T12:00:00Z")
        if any(abs(number) > INTEGER_MAX for number in _integers(self.model_dump())):
            raise ValueError(f"no number may exceed {INTEGER_MAX}")
        return self

    def to_message(self) -> str:
        """JSON of at most MESSAGE_MAX bytes: two links, metrics and then the message are shortened until it fits."""
        copy = self.model_copy(deep=True)
        text = copy.model_dump_json(by_alias=True, exclude_none=True)
        while len(text.encode()) > MESSAGE_MAX:
            if copy.output and copy.output.data_report_json:
                copy.output.data_report_json = copy.output.evaluation_report_json = None
            elif copy.metrics:
                copy.metrics.pop()
            elif copy.evaluation:
                copy.evaluation = None
            elif len(copy.message) > 100:
                copy.message = copy.message[: len(copy.message) // 2] + "…"
            elif copy.checkpoints:
                copy.checkpoints = None
            else:  # a location of a thousand wide characters: nothing left to leave out
                break
            text = copy.model_dump_json(by_alias=True, exclude_none=True)
        return text
