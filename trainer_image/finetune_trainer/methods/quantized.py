"""Layers of bitsandbytes as this program needs them: the same function in training and in evaluation. Called by low_rank."""

import types
from typing import Any

from torch import nn


def settle(inner: nn.Module) -> None:
    """Keeps the quantised layers of a model in training mode.

    In evaluation mode bitsandbytes takes other kernels. On CPUs with AVX512-BF16 the 4-bit one packs the weights anew, in place, so that
    every later training step computes wrong gradients in silence; the 8-bit one quantises its input too, and eval_loss would be that of
    another model than the one that is trained.
    """
    import bitsandbytes

    for module in inner.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            module.training = True
            module.train = types.MethodType(_stay, module)
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.register_forward_pre_hook(_whole)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _whole(module: Any, _: Any) -> None:
    """peft's DoRA takes an 8-bit weight apart to read it, and leaves it without its scales."""
    if module.weight.CB is not None and module.weight.SCB is None:
        module.weight.CB = None
