"""How many sequences go through a GPU at a time when nobody says: as many as fit, up to where more make it no faster. Called by train.

Few rows leave a GPU waiting for the next kernel: one packed sequence of 1,024 tokens, which is usual, trains a model of 1 billion weights
at a sixth of the speed (docs/performance.md). So before the first step of a job the largest micro-batches of its first epoch are tried, of twice as many sequences each
time, forward and backward, and their peak is read. Nothing is learned of them. A run that resumes takes what the first one took, for another
number rounds differently, and fewer only where that does not fit its GPU. Evaluation does as training
does where rows are packed; else, and for what is written or measured before training, it is as usual: those rows may be longer.
"""

import logging
import math
from typing import Final

import torch

from .data.order import Step
from .modelling import footprint
from .ranks import Ranks
from .setup import Setup

ENOUGH: Final = 16_384
"""Tokens in a forward pass, beyond which nothing was won on an H100."""
FILLED: Final = 0.85
"""Part of a GPU's memory that may be filled: later epochs have other micro-batches, and an allocator cannot use all that is free."""
KEPT: Final = 0.95
"""The same for what an earlier run has filled: more, so that a little less memory than there was changes nothing."""

log = logging.getLogger("finetune.micro_batches")


def fitting(setup: Setup, ranks: Ranks, kept: int | None = None) -> int | None:
    """Sequences in a forward pass, the same on all ranks; all ranks call it.

    Args:
        setup: before its first step, or where it goes on.
        ranks: that train.
        kept: what an earlier run took.

    Returns:
        None: as the job says, or as is usual: images, answers that are written on the way (grpo), no GPU.
    """
    spec = setup.spec
    training = spec.training
    given = training.micro_batch_size or training.accumulation_steps
    writes = spec.objective is not None and spec.objective.grpo is not None
    size = setup.micro_batch
    if given or size is None or writes or spec.task == "image-classification" or available(ranks.device) is None:
        return None

    def fits(size: int, part: float) -> bool:
        batch = footprint.largest(setup.of_micro_batch(size), ranks.world)[1]
        if footprint.extent(setup, batch) > ENOUGH and not kept:
            return False
        return not ranks.any(not _fits(setup, batch, ranks.device, part))

    steps = setup.order.epoch(0)[: setup.total_steps]
    most = max(math.ceil(len(step) / ranks.world) for step in steps)
    with setup.masters.rehearsal():
        if kept:
            least, size = size, kept
            while size > least and not fits(size, KEPT):
                size = max(size // 2, least)
        while not kept and size < most and fits(min(2 * size, most), FILLED):
            size = min(2 * size, most)
    setup.objective.told()
    if ranks.first:
        fewer = f", fewer than the {kept} of before" if kept and size < kept else ""
        log.info("%d sequences in a forward pass: what fits the GPU's memory, or is enough%s", size, fewer)
    return size


def available(device: torch.device) -> int | None:
    """Bytes that this process has of a GPU, or may take; None of what is none."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def peak(device: torch.device) -> int:
    """Bytes that were taken of a GPU at most since this was last asked."""
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _fits(setup: Setup, batch: Step, device: torch.device, part: float) -> bool:
    """Whether a micro-batch can be learned from in that part of the memory that there is."""
    peak(device)
    try:
        loss = setup.objective.loss(setup.model, setup.objective.imagined_batch(setup.rows, batch, device))
        (loss / 1).backward()  # type: ignore[no-untyped-call]
        needed: float = peak(device) + setup.masters.gradient.in_flight
    except torch.OutOfMemoryError:
        needed = math.inf
    memory = available(device)
    assert memory is not None
    if needed > part * memory:
        setup.masters.forget_gradients()
        torch.cuda.empty_cache()
        return False
    return True
