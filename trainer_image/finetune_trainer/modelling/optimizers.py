"""AdamW over stretches of one flat vector (Loshchilov and Hutter 2019), with moments in 32 bits or in 8, paged or not. Called by masters."""

import math
from collections.abc import Iterator
from typing import Final, Protocol

import torch
from torch import Tensor

from finetune_crds.resolved import ResolvedAdamW

from . import paged

BLOCK: Final = 256
"""Moments that share a scale in 8 bits: the kernel's."""

Stretch = tuple[int, int]
"""Where a stretch of the vector starts and ends."""


class Optimizer(Protocol):
    """What masters asks."""

    moments: dict[str, Tensor]
    """Vectors as long as that of the weights, by name."""
    scales: dict[str, Tensor]
    """What the moments need besides, by name: a number for each block."""

    def update(
        self, stretch: Stretch, weights: Tensor, gradient: Tensor, number: int, rate: float, weight_decay: float
    ) -> None:
        """One update of a stretch, the `number`th of it, counted from 1. `weights` and `gradient` are those of the stretch."""
        ...


class Moments:
    """The two moments as vectors, and the numbers that both kinds of AdamW need."""

    def __init__(self, like: Tensor, settings: ResolvedAdamW, dtype: torch.dtype) -> None:
        zeros = paged.zeros_like if settings.paged else torch.zeros_like
        self.moments = {name: zeros(like, dtype=dtype) for name in ("first", "second")}
        self.scales: dict[str, Tensor] = {}
        self._paged = settings.paged
        self._beta1, self._beta2, self._epsilon = (
            float(number) for number in (settings.beta1, settings.beta2, settings.epsilon)
        )

    def _of(self, stretch: Stretch) -> Iterator[Tensor]:
        """The moments of a stretch, on their way to the device if they are paged."""
        for moment in self.moments.values():
            part = moment[slice(*stretch)]
            if self._paged:
                paged.fetch(part)
            yield part


class AdamW(Moments):
    """Moments in fp32: eight bytes a weight."""

    def __init__(self, like: Tensor, settings: ResolvedAdamW) -> None:
        super().__init__(like, settings, torch.float32)

    def update(
        self, stretch: Stretch, weights: Tensor, gradient: Tensor, number: int, rate: float, weight_decay: float
    ) -> None:
        """See Optimizer."""
        first, second = self._of(stretch)
        size = rate / (1 - self._beta1**number)
        root = math.sqrt(1 - self._beta2**number)
        if weight_decay:
            weights.mul_(1 - rate * weight_decay)
        first.lerp_(gradient, 1 - self._beta1)
        second.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)
        weights.addcdiv_(first, (second.sqrt() / root).add_(self._epsilon), value=-size)


class AdamW8bit(Moments):
    """Moments in 8 bits, each block of them with a scale (Dettmers et al. 2022): two bytes a weight, by bitsandbytes' kernel."""

    def __init__(self, like: Tensor, settings: ResolvedAdamW) -> None:
        from bitsandbytes import functional

        super().__init__(like, settings, torch.uint8)
        self._kernel = functional.optimizer_update_8bit_blockwise
        maps = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]
        # The codes of zero, so that what lies between weights has no part in a scale, also after a resume. A CPU's kernel knows
        # no exact zero: there it is 2e-5 of the scale, by which no other moment is coded differently.
        for moment, values in zip(self.moments.values(), maps, strict=True):
            moment.fill_(int(values.abs().argmin()))
        self._maps = [values.to(like.device) for values in maps]
        self.scales = {name: torch.zeros(len(like) // BLOCK, device=like.device) for name in ("first", "second")}

    def update(
        self, stretch: Stretch, weights: Tensor, gradient: Tensor, number: int, rate: float, weight_decay: float
    ) -> None:
        """See Optimizer."""
        first, second = self._of(stretch)
        blocks = slice(stretch[0] // BLOCK, stretch[1] // BLOCK)
        self._kernel(
            "adam", gradient, weights, first, second, self._beta1, self._beta2, 0.0, 0.0, self._epsilon, number, rate, *self._maps,
            self.scales["first"][blocks], self.scales["second"][blocks], weight_decay, 1.0, False,
        )  # fmt: skip


def make(like: Tensor, settings: ResolvedAdamW) -> Optimizer:
    """The optimizer of a resolved job, for a vector of weights that is updated in stretches of whole blocks."""
    return AdamW8bit(like, settings) if settings.bits == 8 else AdamW(like, settings)
