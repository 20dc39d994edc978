"""How many rows go through a GPU at a time when nobody says: as many as fit, up to where more make it no faster. Called by train.

Few rows leave a GPU waiting for the next kernel: the default without this, one packed sequence, trains a model of 1 billion weights at half
the speed (docs/performance.md). What fits is counted on the meta device, as a preflight does, before anything is on the GPU. A run that
resumes takes what the first one took, for another number rounds differently.
"""

import dataclasses
import logging
import math
from decimal import Decimal
from typing import Final

import torch

from . import setup
from .modelling import footprint
from .ranks import Ranks
from .setup import Reading

ENOUGH: Final = 16_384
"""Tokens, or images' worth of them, in a forward pass, beyond which nothing was won on an H100."""
FILLED: Final = 0.85
"""Part of the free memory that may be counted on: estimates were up to 1.8 % too low, and exclude evaluation and what the allocator cannot use."""

log = logging.getLogger("finetune.micro_batches")


def free_memory(ranks: Ranks) -> int | None:
    """Bytes that are free on the fullest of all ranks' GPUs; None without GPUs. All ranks."""
    if ranks.device.type != "cuda":
        return None
    return min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[0]))


def fitting(reading: Reading, ranks: Ranks, memory: int) -> int | None:
    """Sequences in a forward pass. All ranks, which find the same. None: as many as is usual, or as the job says.

    Args:
        reading: the inputs.
        ranks: that train.
        memory: bytes of a GPU that may be filled, in part.
    """
    training = reading.spec.training
    if training.micro_batch_size or training.accumulation_steps or reading.spec.task == "image-classification":
        return None
    try:
        return _fitting(_bare(reading), ranks, memory)
    except (NotImplementedError, RuntimeError) as error:
        log.warning(
            "rows in a forward pass are as many as is usual: memory cannot be counted (%s)", type(error).__name__
        )
        return None


def _fitting(reading: Reading, ranks: Ranks, memory: int) -> int:
    found = setup.load(reading, dataclasses.replace(ranks, device=footprint.META), world=ranks.world)
    size = found.micro_batch or 1
    most = max(math.ceil(len(step) / ranks.world) for step in found.order.epoch(0)[: found.total_steps])
    while size < most:
        larger = min(2 * size, most)
        needed = footprint.of(dataclasses.replace(found, micro_batch=larger), ranks.world)
        if needed.total > FILLED * memory or (needed.tokens or 0) > ENOUGH:
            break
        size = larger
    return size


def _bare(reading: Reading) -> Reading:
    """Without what takes no memory in a step and would be made twice."""
    spec = reading.spec
    training = spec.training.model_copy(update={"learning_rate": spec.training.learning_rate or Decimal(1)})
    evaluation = spec.evaluation.model_copy(update={"few_shot": None})
    return dataclasses.replace(
        reading, spec=spec.model_copy(update={"training": training, "evaluation": evaluation}), benchmarks=()
    )
