"""How ranks divide a flat vector among them, so that each holds and updates a part of it (ZeRO, Rajbhandari et al. 2020).

The vector is cut into chunks, and each rank owns an equal part of every chunk: the chunks go around one after the other, which bounds
what a rank holds besides, and all ranks have as much to do whatever part of the vector is trained. Called by masters.
"""

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from .optimizers import BLOCK, Stretch

CHUNK: Final = 1 << 26
"""Weights that go around at a time, about: 256 MiB in fp32."""


class Part(NamedTuple):
    """A stretch that this rank owns."""

    start: int
    """In the whole vector."""
    own: Stretch
    """In what this rank holds."""

    @property
    def whole(self) -> Stretch:
        """In the whole vector."""
        return self.start, self.start + self.own[1] - self.own[0]


class Chunk(NamedTuple):
    """What goes around at a time."""

    start: int
    end: int
    mine: Part


class Partition:
    """A vector among ranks, seen by one of them. Alone it owns all of it, in one chunk."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        unit = world * BLOCK
        self.size = math.ceil(length / unit) * unit
        """Of the vector with what is added behind it, so that every rank owns as much."""
        self._step = self.size if world == 1 else min(self.size, max(unit, CHUNK // unit * unit))
        self.chunks: list[Chunk] = []
        """The whole vector, in order."""
        self.length = 0
        """Of what this rank owns."""
        for start in range(0, self.size, self._step):
            end = min(start + self._step, self.size)
            part = (end - start) // world
            mine = Part(start + rank * part, (self.length, self.length + part))
            self.chunks.append(Chunk(start, end, mine))
            self.length += part

    def across(self, start: int, end: int) -> list[Chunk]:
        """The chunks that a stretch of the vector lies in."""
        return self.chunks[start // self._step : (end - 1) // self._step + 1] if end > start else []

    def owned(self, start: int, end: int) -> Iterator[Part]:
        """What this rank owns of a stretch of the vector."""
        for chunk in self.across(start, end):
            (first, last), offset = chunk.mine.whole, chunk.mine.own[0]
            first, last = max(first, start), min(last, end)
            if first < last:
                offset += first - chunk.mine.start
                yield Part(first, (offset, offset + last - first))
