"""Keys and values that many answers have seen, in one tensor that stays where it is. Called by generation and, through transformers, by layers.

Slot 0 is the newest token's, then come the prompt, behind padding, and what is written. So the step that computes a token writes to a
fixed place, as a captured graph must, and `keep` copies it to its own.
"""

from typing import Any, Final

import torch
from torch import Tensor

MULTIPLE: Final = 16
"""Slots are a multiple of it: attention's kernels copy masks of other lengths."""


class Cache:
    """What layers of transformers call past_key_values: `update` is all that they need of it."""

    def __init__(self, layers: int, answers: int, width: int, most: int) -> None:
        """
        Args:
            layers: of the model.
            answers: to each prompt, which is read once.
            width: tokens of a prompt and of the padding before it.
            most: tokens of an answer.
        """
        self._layers, self._answers, self._width = layers, answers, width
        self.slots = -(-(1 + width + most) // MULTIPLE) * MULTIPLE
        self.bound = self.slots
        """Slots that attention looks at."""
        self.reads = True
        """Whether the prompts are being read."""
        self._held: Tensor | None = None
        """(2, layers, sequences, key heads, slots, size). Zero where nothing is written yet: attention multiplies it by zero."""

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes in keys and values of a layer, (sequences, key heads, tokens, size): of the prompts, or of a token of each answer.

        Returns:
            Those that are seen: the prompts', or all there are.
        """
        prompts, heads, size = len(key), key.shape[1], key.shape[3]
        if self._held is None:
            shape = (2, self._layers, prompts * self._answers, heads, self.slots, size)
            self._held = torch.zeros(shape, dtype=key.dtype, device=key.device)
        held = self._held[:, layer]
        if self.reads:
            slots = held[:, :, :, 1 : 1 + self._width].view(2, prompts, self._answers, heads, self._width, size)
            slots[0].copy_(key[:, None])
            slots[1].copy_(value[:, None])
            return key, value
        held[0, :, :, :1].copy_(key)
        held[1, :, :, :1].copy_(value)
        return held[0, :, :, : self.bound], held[1, :, :, : self.bound]

    def keep(self, place: int) -> None:
        """The newest token is an answer's token of this number."""
        assert self._held is not None
        self._held[..., 1 + self._width + place, :].copy_(self._held[..., 0, :])
