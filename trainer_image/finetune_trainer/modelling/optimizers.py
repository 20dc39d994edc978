"""AdamW over stretches of one flat vector (Loshchilov and Hutter 2019), with moments in 32 bits or in 8. Called by masters."""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from finetune_crds.resolution import ResolvedAdamW

BLOCK: Final = 256
"""Moments that share a scale in 8 bits: the kernel's."""

Stretch = tuple[int, int]
"""Where a stretch of the vector starts and ends."""


class Optimizer(Protocol):
    """What masters asks."""

    moments: dict[str, Tensor]
    """Vectors as long as that of the weights, by name."""
    scales: dict[str, Tensor]
    """What the moments need besides, by name."""

    def update(
        self, stretch: Stretch, weights: Tensor, gradient: Tensor, number: int, rate: float, weight_decay: float
    ) -> None:
        """One update of a stretch, the `number`th of it, counted from 1. `weights` and `gradient` are those of the stretch."""
        ...


class AdamW:
    """Moments in fp32: eight bytes a weight."""

    def __init__(self, like: Tensor, settings: ResolvedAdamW) -> None:
        self.moments = {"first": torch.zeros_like(like), "second": torch.zeros_like(like)}
        self.scales: dict[str, Tensor] = {}
        self._beta1, self._beta2, self._epsilon = _numbers(settings)

    def update(
        self, stretch: Stretch, weights: Tensor, gradient: Tensor, number: int, rate: float, weight_decay: float
    ) -> None:
        """See Optimizer."""
        first, second = (moment[slice(*stretch)] for moment in self.moments.values())
        size = rate / (1 - self._beta1**number)
        root = math.sqrt(1 - self._beta2**number)
        if weight_decay:
            weights.mul_(1 - rate * weight_decay)
        first.lerp_(gradient, 1 - self._beta1)
        second.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)
        weights.addcdiv_(first, (second.sqrt() / root).add_(self._epsilon), value=-size)


class AdamW8bit:
    """Moments in 8 bits, each block of them with a scale (Dettmers et al. 2022): two bytes a weight, by bitsandbytes' kernel."""

    def __init__(self, like: Tensor, settings: ResolvedAdamW, stretches: Sequence[Stretch]) -> None:
        from bitsandbytes import functional

        self._kernel = functional.optimizer_update_8bit_blockwise
        self._maps = [functional.create_dynamic_map(signed=signed).to(like.device) for signed in (True, False)]
        self.moments = {name: torch.zeros_like(like, dtype=torch.uint8) for name in ("first", "second")}
        self._blocks: dict[Stretch, slice] = {}
        total = 0
        for start, end in stretches:
            count = math.ceil((end - start) / BLOCK)
            self._blocks[start, end] = slice(total, total + count)
            total += count
        self.scales = {name: torch.zeros(total, device=like.device) for name in ("first", "second")}
        self._beta1, self._beta2, self._epsilon = _numbers(settings)

    def update(
        self, stretch: Stretch, weights: Tensor, gradient: Tensor, number: int, rate: float, weight_decay: float
    ) -> None:
        """See Optimizer."""
        first, second = (moment[slice(*stretch)] for moment in self.moments.values())
        blocks = self._blocks[stretch]
        self._kernel(
            "adam", gradient, weights, first, second, self._beta1, self._beta2, 0.0, 0.0, self._epsilon, number, rate, *self._maps,
            self.scales["first"][blocks], self.scales["second"][blocks], weight_decay, 1.0, False,
        )  # fmt: skip


def make(like: Tensor, settings: ResolvedAdamW, stretches: Sequence[Stretch]) -> Optimizer:
    """The optimizer of a resolved job, for a vector of weights that is updated in these stretches."""
    return AdamW8bit(like, settings, stretches) if settings.bits == 8 else AdamW(like, settings)


def _numbers(settings: ResolvedAdamW) -> tuple[float, float, float]:
    return float(settings.beta1), float(settings.beta2), float(settings.epsilon)
