"""The processes that train together, and the few things that they say to each other.

All of it is here, in words of this program: sum, agree, share. With one process nothing is started. Called by train and what it calls.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PeerLost, TrainerError

T = TypeVar("T")

CPU = torch.device("cpu")
TIMEOUT = timedelta(hours=2)
"""Longest wait for a peer: the first rank of a node may be downloading and tokenising."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among them."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @classmethod
    def join(cls, *, gpu: bool) -> "Ranks":
        """Meets the others, as the environment says (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
        rank, world, local = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        device = torch.device("cuda", local) if gpu else CPU
        if gpu:
            torch.cuda.set_device(device)
            make_repeatable()
        if world > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo", rank=rank, world_size=world, timeout=TIMEOUT
            )
        return cls(rank, world, local, device)

    def leave(self) -> None:
        """Says good-bye, when all went well."""
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that reports, commits and publishes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> None:
        """Adds up a tensor over ranks, in place; every rank gets the same bits."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def reduce_scatter_(self, tensor: Tensor, part: Tensor) -> Callable[[], None]:
        """Begins to add up a tensor over ranks, of which each rank gets its part: `part`, which is the rank's own place in it. The rest is spoiled.

        Returns:
            Call it before `part` is read, and keep `tensor` until then.
        """
        if self.world == 1 or tensor.is_meta:
            return lambda: None
        work = dist.reduce_scatter_tensor(part, tensor, async_op=True)
        assert work is not None

        def wait() -> None:
            work.wait()

        return wait

    def all_gather_(self, tensor: Tensor, part: Tensor) -> None:
        """Fills a tensor with the parts of all ranks, in order. `part` may be the rank's own place in it."""
        if self.world > 1 and not tensor.is_meta:
            dist.all_gather_into_tensor(tensor, part)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Adds up a few numbers over ranks, in float64."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(tensor)
        return [float(number) for number in tensor]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sums([float(flag)])[0] > 0

    def gather(self, thing: T) -> list[T]:
        """What every rank has, by rank, on every rank."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def once(self, work: Callable[[], T], *, each_node: bool = False) -> T:
        """Does work on the first rank only, and shares what it returns (must pickle). If it fails, everybody stops.

        Args:
            work: raises TrainerError; what else it raises ends this process, which its peers notice.
            each_node: do it on the first rank of every node, for what lies on a node's disk; each gets its own node's result.
        """
        chosen = self.local_rank == 0 if each_node else self.first
        result: T | None = None
        error: TrainerError | None = None
        if chosen:
            try:
                result = work()
            except TrainerError as raised:
                error = raised
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerLost("another rank of this job failed, and says why")
        by = self.rank - self.local_rank if each_node else 0
        shared: T = self.gather(result)[by]  # type: ignore[assignment]
        return shared


def make_repeatable() -> None:
    """Asks for kernels that give the same bits each time, so that a resumed run equals one that was never stopped.

    With `warn_only` flash attention would still take its faster backward, which differs from run to run. cuBLAS also needs
    CUBLAS_WORKSPACE_CONFIG, set before it is first used. What is asked to be fp32 is, too: convolutions would else round it to TF32.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
