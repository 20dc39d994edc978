"""Learning rate by step. Pure; called by train."""

import math
from typing import Literal


def warmup_steps(total: int, *, steps: int | None, ratio: str | None) -> int:
    """Steps of warm-up, from a number or a part of all steps (rounded up)."""
    return steps if steps is not None else math.ceil(float(ratio or 0) * total)


def learning_rate(
    step: int, total: int, peak: float, warmup: int, shape: Literal["cosine", "linear", "constant"]
) -> float:
    """Learning rate of the update that makes `step` updates into `step + 1`.

    It rises in equal parts and reaches the peak with the last step of warm-up (no step is wasted on 0), then falls towards 0, which it
    would reach one step after the last.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(1, total - warmup)
    match shape:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))
        case "linear":
            return peak * max(0.0, 1 - part)
        case "constant":
            return peak
