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
    """The trained weights of a model and AdamW over them (Loshchilov and Hutter 2019), with decay on matrices only.

    Weights lie group by group, so that each group's learning rate, beginning and count of steps is that of one stretch of the vector.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: torch.dtype,
        groups: Sequence[Group] | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.groups = tuple(groups or [Group(tuple(trained))])
        listed = [name for group in self.groups for name in group.names]
        if sorted(listed) != sorted(trained):
            raise ValueError("every trained weight must be in exactly one group")
        self._parameters: dict[str, nn.Parameter] = {}
        self._starts: dict[str, int] = {}
        self._stretches: list[tuple[int, int, int]] = []
        """Of each group: where it starts, where its matrices end, where it ends."""
        total = 0
        for group in self.groups:
            start = total
            for matrices in (True, False):
                for name in group.names:
                    if (trained[name].ndim >= 2) == matrices:
                        self._parameters[name] = trained[name]
                        self._starts[name] = total
                        total += trained[name].numel()
                if matrices:
                    decayed = total
            self._stretches.append((start, decayed, total))
        self._betas, self._epsilon = betas, epsilon
        device = next(iter(trained.values())).device
        self.weights = torch.empty(total, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.weights)
        self.first_moment = torch.zeros_like(self.weights)
        self.second_moment = torch.zeros_like(self.weights)
        for name, parameter in self._parameters.items():
            view = self._view(self.weights, name)
            view.copy_(parameter.data)
            parameter.data = view if compute == torch.float32 else parameter.data.to(compute)
            parameter.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self.weights.numel()

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
        parts = {"weight": self.weights, "first": self.first_moment, "second": self.second_moment}
        return {f"{part}/{name}": view for part, vector in parts.items() for name, view in self.named(vector)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, view in self.state().items():
            view.copy_(state[name])
        self.refresh()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over weights only: what is published need not be what training ended with."""
        for name, view in self.named(self.weights):
            view.copy_(weights[name])
        self.refresh()

    def refresh(self) -> None:
        """Copies the masters to weights that compute in another type."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.data.copy_(self._view(self.weights, name))

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
        beta1, beta2 = self._betas
        for group, rate, (begin, decayed, end) in zip(self.groups, rates, self._stretches, strict=True):
            number = done - group.start + 1
            if number < 1:
                continue
            size = rate / (1 - beta1**number)
            root = math.sqrt(1 - beta2**number)
            for start, stop in (*_slices(begin, decayed), *_slices(decayed, end)):
                weights, gradient = self.weights[start:stop], self.gradient[start:stop]
                first, second = self.first_moment[start:stop], self.second_moment[start:stop]
                if weight_decay and stop <= decayed:
                    weights.mul_(1 - rate * weight_decay)
                first.lerp_(gradient, 1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                weights.addcdiv_(first, (second.sqrt() / root).add_(self._epsilon), value=-size)
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


def _slices(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, SLICE):
        yield start, min(start + SLICE, end)
