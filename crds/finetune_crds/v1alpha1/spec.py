"""What a user asks for. The sections are modules of their own; docstrings are what `kubectl explain` prints.

A field is here only if it works. Defaults that depend on the method, the model or the hardware are not in the schema but in
`finetune_crds.resolution`, so that a later release can choose better without touching jobs that already run.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .. import support
from .common import (
    ApiModel,
    Name,
    Rule,
)
from .dataset import Dataset
from .evaluation import Evaluation
from .methods import Method
from .model import Model
from .objective import Objective
from .pods import Cleanup, Resources, Runtime
from .results import Checkpoints, Output
from .rules import RULES
from .training import Training


class FineTuneJobSpec(ApiModel):
    """What to train, on what, how, and where the result goes."""

    rules: ClassVar[tuple[Rule, ...]] = RULES

    task: support.Task | None = None
    """What the model is for. Default text-generation."""
    model: Model | None = None
    """The model to start from."""
    dataset: Dataset | None = None
    """What to learn from."""
    objective: Objective | None = None
    """What is optimised. Default sft for text-generation, classification for text-classification, token-classification and image-classification; question-answering, summarization and translation have their own."""
    method: Method | None = None
    """Which weights are trained. Default lora."""
    training: Training | None = None
    """Hyperparameters."""
    evaluation: Evaluation | None = None
    """Evaluation, early stopping, questions of your own."""
    checkpoints: Checkpoints | None = None
    """Saving the state of training."""
    output: Output | None = None
    """Where the result goes."""
    resources: Resources | None = None
    """What each pod gets."""
    preflight: Literal["Required", "Skip"] | None = None
    """Required: model, data, template, places and memory are checked in a pod without a GPU before GPUs are asked for, and what is wrong fails the job there, with row numbers. Default Required with GPUs and our own trainer, else Skip: the trainer checks the same first anyway."""
    suspend: bool | None = None
    """True saves a checkpoint and frees the GPUs; false continues from it."""
    retries: Annotated[int, Field(ge=0, le=100)] | None = None
    """New attempts after failures that may pass; disruptions such as a drained node are free. Default 3."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=315_360_000)] | None = None
    """Longest time from the first child to the end, suspension not counted. Then a checkpoint is saved and the job fails."""
    cleanup: Cleanup | None = None
    """Removing the children of a finished job."""
    priority_class_name: Name | None = None
    """PriorityClass of the pods."""
    runtime: Runtime | None = None
    """The container that trains."""
