"""Work that is repeated on the same tensors, on CUDA as one graph: hundreds of small kernels for one launch. Called by generation.

A graph can hold no wait of the host for the device, such as that for how many tokens go to an expert. Whether there is one shows when the
work is done for the first time, so nothing has to be known of families and layers.
"""

import warnings
from collections.abc import Callable
from typing import Final

import torch

_WAITING: Final = "called a synchronizing CUDA operation"
"""What torch warns of."""


class Repeated:
    """Work without arguments or result. The kernels are the same, captured or not."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._captures: bool | None = None if device.type == "cuda" else False
        """Whether it can be captured; None: not known yet."""
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Does the work."""
        if self._captures is None:
            self._captures = not waits(self._work)
            return
        if not self._captures:
            self._work()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # NCCL's own thread may go on
                self._work()
        self._graph.replay()


def waits(work: Callable[[], None]) -> bool:
    """Does the work, and says whether the host waited for the device meanwhile."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return any(_WAITING in str(warning.message) for warning in seen)
