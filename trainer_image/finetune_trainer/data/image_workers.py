"""Processes that make images side by side. Threads do not do it: half of the work is Python's, and the more of them there are, the more they wait for each other.

What is made is written into memory that all share. Called by pixels.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any, Final

import torch
from torch import Tensor

FEW: Final = 2
"""Processors with which threads are as fast, and there at once."""
MOST: Final = 16
"""Processes of a rank: each takes some 100 MB."""
AHEAD: Final = 8
"""Images of a process that have room in memory."""

Call = tuple[Any, ...]
_make: Callable[..., Tensor]
"""In a worker: what makes an image."""
_memory: Tensor
"""In a worker: where images go, bytes."""


class ImageWorkers:
    """Processes for one maker of images."""

    def __init__(self, make: Callable[..., Tensor], like: Tensor, count: int, imports: Sequence[str] = ()) -> None:
        """
        Args:
            make: gives an image of what it is called with; it and that are pickled.
            like: an image, as they all are in shape and type.
            count: processes.
            imports: modules that are imported once, before processes are forked.
        """
        self._like = like
        self._count = min(count, MOST)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *imports])
        memory = context.RawArray("B", self._count * AHEAD * like.nbytes)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._processes = ProcessPoolExecutor(self._count, context, _begin, (make, memory))

    def __call__(self, calls: Sequence[Call]) -> Tensor:
        """(images, *shape of one): the image of each call, in their order.

        Raises:
            BrokenProcessPool: a process was killed.
            Exception: what the maker raised.
        """
        made = torch.empty(len(calls), *self._like.shape, dtype=self._like.dtype)
        room = self._count * AHEAD
        for begin in range(0, len(calls), room):
            now = calls[begin : begin + room]
            each = -(-len(now) // self._count)
            parts = [self._processes.submit(_fill, at, now[at : at + each]) for at in range(0, len(now), each)]
            wait(parts)  # where one has failed, too: none writes into what comes next
            for part in parts:
                part.result()
            images = self._memory[: len(now) * self._like.nbytes].view(self._like.dtype)
            made[begin : begin + room] = images.view(len(now), *self._like.shape)
        return made


def _begin(make: Callable[..., Tensor], memory: Any) -> None:
    """Of each process. It ends with the one that it works for, also where that is killed."""
    global _make, _memory
    _make, _memory = make, torch.frombuffer(memory, dtype=torch.uint8)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _fill(begin: int, calls: Sequence[Call]) -> None:
    """Makes images, the first of which is that number in memory."""
    for i, call in enumerate(calls, begin):
        image = _make(*call).contiguous()
        _memory[i * image.nbytes : (i + 1) * image.nbytes] = image.view(-1).view(torch.uint8)
