"""Trained weights in fp32, their gradients and the optimizer's state, each in one flat vector.

Flat, because then the all-reduce, the norm, the clipping and the optimizer are each one call on one tensor whatever the model. If the
model computes in bf16, its weights are copies that `refresh` makes once a step: 98 % of bf16 weights do not move at an update of 1e-5.
Gradients add up in fp32 across micro-batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune_crds.resolved import ResolvedAdamW

from ..ranks import Ranks
from . import optimizers
from .norms import batch_norms
from .optimizers import BLOCK, Stretch

SLICE = 1 << 24
"""Weights that the optimizer updates at a time: bounds its temporary memory, and fits caches."""


@dataclass(frozen=True)
class Group:
    """Trained weights that share a learning rate and a beginning."""

    names: tuple[str, ...]
    rate: float = 1.0
    """Their learning rate as a multiple of the job's."""
    start: int = 0
    """Steps before they begin: warm-up, schedule and optimizer count from here, and until then they keep each bit."""


class Masters:
    """The trained weights of a model and an optimizer over them, with decay on matrices only.

    Weights lie group by group, so that each group's learning rate, beginning and count of steps is that of one stretch of the vector.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: torch.dtype,
        settings: ResolvedAdamW,
        groups: Sequence[Group] | None = None,
        *,
        pull: float = 0.0,
        fresh: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            model: holds the weights; those that require a gradient are trained.
            compute: what it computes in.
            settings: of the optimizer.
            groups: of the trained weights; default one.
            pull: L2-SP: decay towards what the weights are now.
            fresh: modules that begin from nothing that they should stay near.
        """
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.groups = tuple(groups or [Group(tuple(trained))])
        listed = [name for group in self.groups for name in group.names]
        if sorted(listed) != sorted(trained):
            raise ValueError("every trained weight must be in exactly one group")
        self._parameters: dict[str, nn.Parameter] = {}
        self._starts: dict[str, int] = {}
        self._stretches: list[list[tuple[Stretch, bool]]] = []
        """Of each group: the stretches in which it is updated, and whether they are matrices."""
        total = 0  # weights begin at whole blocks: at addresses that every kernel takes, and no two share a scale of 8-bit moments
        for group in self.groups:
            own: list[tuple[Stretch, bool]] = []
            for matrices in (True, False):
                start = total
                for name in group.names:
                    if (trained[name].ndim >= 2) == matrices:
                        self._parameters[name] = trained[name]
                        self._starts[name] = total
                        total += math.ceil(trained[name].numel() / BLOCK) * BLOCK
                own += [((at, min(at + SLICE, total)), matrices) for at in range(start, total, SLICE)]
            self._stretches.append(own)
        device = next(iter(trained.values())).device
        norms = {f"{name}.": norm for name, norm in batch_norms(model).items()}
        self.buffers = {
            f"{name}{buffer}": tensor
            for name, norm in norms.items()
            if f"{name}weight" in trained
            for buffer, tensor in norm.named_buffers()
        }
        """What training changes besides: running statistics of batch normalisation that is trained, as the model holds them."""
        self.weights = torch.zeros(total, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.weights)
        self.optimizer = optimizers.make(
            self.weights, settings, [stretch for own in self._stretches for stretch, _ in own]
        )
        for name, parameter in self._parameters.items():
            view = self._view(self.weights, name)
            view.copy_(parameter.data)
            stays = compute == torch.float32 or f"{name.rpartition('.')[0]}." in norms
            parameter.data = view if stays else parameter.data.to(compute)
            parameter.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]

        self._pull = pull
        self._origin = self.weights.clone() if pull else None
        self._pulled = (
            {name for name in self._parameters if not name.startswith(tuple(f"{one}." for one in fresh))}
            if pull
            else set()
        )

    def __len__(self) -> int:
        """Weights that are trained."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def origin(self) -> list[Tensor]:
        """What L2-SP pulls to, if it does."""
        return [] if self._origin is None else [self._origin]

    @property
    def names(self) -> list[str]:
        """Names of the trained weights."""
        return list(self._parameters)

    def named(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of a flat vector by the weights' names and shapes."""
        for name in self._parameters:
            yield name, self._view(vector, name)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name, as views."""
        vectors = {"weight": self.weights, **self.optimizer.moments}
        views = {f"{part}/{name}": view for part, vector in vectors.items() for name, view in self.named(vector)}
        views |= {f"scales/{name}": scales for name, scales in self.optimizer.scales.items()}
        return views | {f"buffer/{name}": buffer for name, buffer in self.buffers.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, view in self.state().items():
            view.copy_(state[name])
        self.refresh()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over weights and running statistics only: what is published need not be what training ended with."""
        for name, view in (*self.named(self.weights), *self.buffers.items()):
            view.copy_(weights[name])
        self.refresh()

    def refresh(self) -> None:
        """Copies the masters to weights that compute in another type."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.data.copy_(self._view(self.weights, name))

    def average_buffers(self, ranks: Ranks) -> None:
        """Makes running statistics those of all ranks: the mean of what each has seen."""
        if ranks.world == 1 or not self.buffers:
            return
        means = [buffer for buffer in self.buffers.values() if buffer.is_floating_point()]
        flat = torch.cat([buffer.flatten() for buffer in means])
        ranks.sum_(flat)
        parts = torch.split(flat.div_(ranks.world), [buffer.numel() for buffer in means])
        for buffer, mean in zip(means, parts, strict=True):
            buffer.copy_(mean.view_as(buffer))

    def norm(self) -> Tensor:
        """L2 norm of the whole gradient."""
        norm: Tensor = torch.linalg.vector_norm(self.gradient)
        return norm

    def begin(self, step: int) -> None:
        """Lets gradients flow to the groups that have begun after `step` steps, and to no others."""
        for group in self.groups:
            for name in group.names:
                self._parameters[name].requires_grad_(group.start <= step)

    def step(self, done: int, rates: Sequence[float], weight_decay: float) -> None:
        """One update of the groups that have begun; then the gradient is zero again.

        Args:
            done: updates before this one.
            rates: learning rate of each group.
            weight_decay: of matrices.
        """
        for group, rate, stretches in zip(self.groups, rates, self._stretches, strict=True):
            number = done - group.start + 1
            if number < 1:
                continue
            if self._origin is not None:
                for name in self._pulled.intersection(group.names):
                    self._view(self.weights, name).lerp_(self._view(self._origin, name), rate * self._pull)
            for stretch, matrices in stretches:
                decay = weight_decay if matrices else 0.0
                start, end = stretch
                self.optimizer.update(stretch, self.weights[start:end], self.gradient[start:end], number, rate, decay)
        self.gradient.zero_()
        self.refresh()

    def _view(self, vector: Tensor, name: str) -> Tensor:
        start = self._starts[name]
        parameter = self._parameters[name]
        return vector[start : start + parameter.numel()].view(parameter.shape)

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        view = self._view(self.gradient, name)

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            view.add_(parameter.grad)
            parameter.grad = None

        return collect
