"""How many sequences go through a GPU at a time when nobody says: as many as fit, up to where more make it no faster. Called by train.

Few rows leave a GPU waiting for the next kernel: one packed sequence of 1,024 tokens, which is usual, trains a model of 1 billion weights
at a sixth of the speed (docs/performance.md). So before the first step of a job its largest micro-batches are tried, of twice as many sequences
each time, forward and backward, and their peak is read. Nothing is learned of them. A run that resumes on as many GPUs of that memory takes
what the first one took, for another number rounds differently. Evaluation does as training does where rows are packed; else, and for what is
written or measured before training, it is as usual: those rows may be longer.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

import torch

from .data.order import Step, share
from .errors import Stopped, lacks_gpu_memory
from .modelling import footprint
from .ranks import Ranks
from .results.state import MicroBatch
from .setup import Setup

ENOUGH: Final = 16_384
"""Tokens in a forward pass, beyond which nothing was won on an H100."""
FILLED: Final = 0.85
"""Part of a GPU's memory that may be filled: an allocator cannot use all that is free, and NCCL and evaluation take some."""
KEPT: Final = 0.95
"""The same for what an earlier run has filled: more, so that a little less that is free changes nothing."""
_ALIKE: Final = 0.05
"""Part by which the memory of two GPUs of one kind may differ."""

log = logging.getLogger("finetune.micro_batches")


def fitting(
    setup: Setup, ranks: Ranks, kept: MicroBatch | None = None, stopping: Callable[[], bool] = lambda: False
) -> MicroBatch | None:
    """Sequences in a forward pass, the same on all ranks; all ranks call it.

    Args:
        setup: before its first step, or where it goes on.
        ranks: that train.
        kept: what an earlier run took. On other GPUs it is found anew.
        stopping: whether this rank was asked to stop; asked between what is tried.

    Returns:
        None: as the job says, or as is usual: images, answers that are written on the way (grpo), no GPU.

    Raises:
        Stopped: some rank was asked to.
    """
    usual, own = _usual(setup), memory(ranks.device)
    if usual is None or own is None:
        return None
    smallest = min(ranks.gather(own))
    if kept and (kept.world != ranks.world or abs(smallest - kept.memory) > _ALIKE * kept.memory):
        kept = None
    batches = _largest(setup, _halves(kept.size, usual), ranks.world) if kept else tried(setup, ranks.world)
    found = usual
    with setup.masters.rehearsal():
        for size, batch in batches.items():
            if ranks.any(stopping()):
                raise Stopped("stopped before training began, or went on")
            fits = not ranks.any(not _fits(setup, batch, ranks.device, KEPT if kept else FILLED))
            if fits:
                found = size
            if fits is bool(kept):
                break
    setup.objective.told()
    torch.cuda.empty_cache()  # for NCCL, which allocates beside torch
    if ranks.first:
        fewer = f", fewer than the {kept.size} of before" if kept and found < kept.size else ""
        log.info("%d sequences in a forward pass: what fits the GPU's memory, or is enough%s", found, fewer)
    return MicroBatch(size=found, world=ranks.world, memory=smallest)


def tried(setup: Setup, world: int) -> dict[int, Step]:
    """The sizes that a job tries which has not begun, ascending, each with its largest micro-batch. None where nothing is to be found.

    Args:
        setup: on a GPU, or on the meta device.
        world: ranks that share a step.
    """
    usual = _usual(setup)
    if usual is None:
        return {}
    most = max(math.ceil(len(step) / world) for step in setup.order.epoch(0)[: setup.total_steps])
    return _largest(setup, _doubles(usual, most), world, ENOUGH)


def memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None of what is none."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def available(device: torch.device) -> int:
    """Bytes that this process has of a GPU, or may take."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def peak(device: torch.device) -> int:
    """Bytes that were taken of a GPU at most since this was last asked."""
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _usual(setup: Setup) -> int | None:
    """Sequences to begin with; None where the job says how many, or none are tried."""
    spec = setup.spec
    given = spec.training.micro_batch_size or spec.training.accumulation_steps
    writes = spec.objective is not None and spec.objective.grpo is not None
    return None if given or writes or spec.task == "image-classification" else setup.micro_batch


def _doubles(usual: int, most: int) -> list[int]:
    sizes = []
    while usual < most:
        usual = min(2 * usual, most)
        sizes.append(usual)
    return sizes


def _halves(kept: int, usual: int) -> list[int]:
    sizes = []
    while kept > usual:
        sizes.append(kept)
        kept //= 2
    return sizes


def _largest(setup: Setup, sizes: Sequence[int], world: int, limit: float = math.inf) -> dict[int, Step]:
    """Of each size the largest micro-batch that training will have, on whatever rank; of no size that has one of more tokens than `limit`."""
    found: dict[int, tuple[int, Step]] = {}
    for step in _steps(setup) if sizes else ():
        for size in sizes:
            for rank in range(min(world, len(step))):
                for batch in share(step, rank, world, size=size, forwards=None):
                    extent = footprint.extent(setup, batch)
                    if size not in found or extent > found[size][0]:
                        found[size] = extent, batch
        sizes = [size for size in sizes if found[size][0] <= limit]
    return {size: found[size][1] for size in sizes}


def _steps(setup: Setup) -> Iterator[Step]:
    """All that will be; where rows are packed the first epoch stands for the others, since its sequences are as full as theirs."""
    if setup.spec.training.packing:
        yield from setup.order.epoch(0)[: setup.total_steps]
    else:
        yield from (step for _, step in islice(setup.order.walk(0), setup.total_steps))


def _fits(setup: Setup, batch: Step, device: torch.device, part: float) -> bool:
    """Whether a micro-batch can be learned from in that part of the memory that there is."""
    peak(device)
    needed = math.inf
    try:
        _learn(setup, batch, device)
        needed = peak(device) + setup.masters.gradient.in_flight
    except RuntimeError as error:
        if not lacks_gpu_memory(error):
            raise
    if needed > part * available(device):
        torch.cuda.empty_cache()
        peak(device)
        return False
    return True


def _learn(setup: Setup, batch: Step, device: torch.device) -> None:
    """A function of its own, so that its graph is gone when it fails."""
    loss = setup.objective.loss(setup.model, setup.objective.imagined_batch(setup.rows, batch, device))
    (loss / 1).backward()  # type: ignore[no-untyped-call]
