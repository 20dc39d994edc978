"""What the loader, the loop and the publisher ask of any method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from finetune_crds import locations
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.support import Task

from ..modelling import anatomy
from ..modelling.anatomy import Anatomy
from ..modelling.masters import Group
from ..modelling.models import Model
from ..modelling.tasks import TASKS

Format = Literal["peft", "transformers", "bottleneck"]


@dataclass(frozen=True)
class Base:
    """A model as it was loaded, before a method."""

    inner: Any
    """The transformers model."""
    folder: Path
    """Where it was read from."""
    adapter: Path | None
    """A LoRA adapter to continue from."""
    stored: torch.dtype
    """What it is stored in."""
    compute: torch.dtype
    """What forward and backward compute in."""
    reload: Callable[[], Any]
    """Reads the transformers model again, on the CPU, in the type that it is stored in."""

    task: Task
    """Whose head it has: the head of a task is trained by every method."""
    added: Sequence[int] = ()
    """Ids of the tokens of model.addTokens."""

    @property
    def anatomy(self) -> Anatomy:
        """Where its parts are."""
        return anatomy.of(self.inner.config.model_type)

    @property
    def head_modules(self) -> list[str]:
        """Names of the task's own head; empty for text generation."""
        return list(anatomy.head(self.inner.config, self.task))

    @property
    def peft_task(self) -> str | None:
        """What peft calls the task, if it has a name for it."""
        return TASKS[self.task].peft


class Method(ABC):
    """One way to choose what is trained. Made anew for each run."""

    format: ClassVar[Format]
    """What its output is."""
    learns_the_model: ClassVar[bool] = False
    """Whether the model's own weights are trained, so that they are loaded in fp32."""

    def __init__(self, spec: ResolvedFineTune) -> None:
        self.spec = spec

    @property
    def output_format(self) -> Format:
        """What this job's output is: with output.merged a whole model."""
        return "transformers" if self.spec.output.merged else self.format

    def quantization(self, model_type: str) -> Any:
        """transformers' quantisation config for loading a model of this family, or None."""
        return None

    @property
    def beginning(self) -> str:
        """Of what is trained, a digest of that which was not drawn from the seed: it must be the same on every rank."""
        return ""

    @abstractmethod
    def put_on(self, base: Base) -> Model:
        """The model with what is trained on it; `requires_grad` says which weights those are.

        Raises:
            UserError: the model has no such parts.
        """

    def untouched(self, model: Model) -> AbstractContextManager[Model] | None:
        """Puts the model back to what it was before anything was trained, for a while; None where that cannot be done while it trains."""
        return None

    def groups(self, model: Model, names: Sequence[str], steps_per_epoch: int, total_steps: int) -> list[Group]:
        """Every trained weight in one group, the first group being the one whose learning rate is reported.

        Args:
            model: of put_on.
            names: of its trained weights.
            steps_per_epoch: of the first epoch.
            total_steps: of the whole job.
        """
        return [Group(tuple(names))]

    @abstractmethod
    def save(self, folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
        """Writes the output's weights and configuration.

        Args:
            folder: where to.
            model: holds the weights in the type that it computes in.
            weights: the trained weights by name, in fp32; may be emptied on the way.
        """

    def output_servable_by(self, model: Model) -> list[str]:
        """Servers that take this job's output as it is: vLLM any whole model that writes."""
        if self.output_format == "transformers":
            return ["vllm"] if self.spec.head == "text-generation" else []
        return self.servable_by(model)

    def servable_by(self, model: Model) -> list[str]:
        """Servers that take what `save` writes, where that is an adapter."""
        return []

    def summary(self, model: Model) -> str:
        """What is trained and what is not, in a sentence, where that is not plain from the method's name; for the log and the card."""
        return ""

    def how_to_load(self, model_type: str, kind: str, base: str, names: str) -> str:
        """Python that opens what `save` wrote, for its card.

        Args:
            model_type: the model's family.
            kind: name of the transformers class.
            base: name or place of the model.
            names: more arguments for loading it, each with a comma in front.
        """
        return (
            f'base = transformers.{kind}.from_pretrained("{base}"{names})\n'
            'model = peft.PeftModel.from_pretrained(base, "this folder")'
        )


def hub_name(uri: str) -> tuple[str, str | None]:
    """What libraries call a model: org/name and revision on the hub, on this disk its path; of another place its URI."""
    place = locations.parse(uri)
    if place.scheme == "hf":
        return place.root, place.revision
    return (place.path if place.scheme == "file" else uri), None
