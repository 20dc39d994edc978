"""Layers of bitsandbytes as this program needs them. Called by low_rank and merging."""

import copy
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a quantised linear layer. False where bitsandbytes was never needed: it is not imported to find out."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)


def settle(inner: nn.Module) -> None:
    """Keeps the quantised layers of a model in training mode: the same function in training and in evaluation.

    In evaluation mode bitsandbytes takes other kernels. On CPUs with AVX512-BF16 the 4-bit one packs the weights anew, in place, so that
    every later training step computes wrong gradients in silence; the 8-bit one quantises its input too, and eval_loss would be that of
    another model than the one that is trained.
    """
    import bitsandbytes

    for module in inner.modules():
        if is_quantized(module):
            module.training = True
            object.__setattr__(module, "train", types.MethodType(_stay, module))
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.register_forward_pre_hook(_whole)
            module.register_forward_hook(_forget_inputs)


def dequantized(module: Any) -> Tensor:
    """(out, in), fp32: the weights that a settled layer computes with."""
    import bitsandbytes

    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32
        weight: Tensor = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        return weight
    scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    weight = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, scales)
    return weight


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _forget_inputs(module: Any, _: Any, out: Tensor) -> None:
    """Of an 8-bit layer's inputs only gradients of its weights are made, which are frozen; bitsandbytes keeps them until the step's graph is gone."""
    node: Any = out.grad_fn
    if hasattr(node, "tensors"):  # on GPUs: inputs, and a copy of the columns with outliers
        node.tensors, node.tensor_states = (None, None, None), (None, None)
    elif hasattr(node, "A"):
        node.A = None


def _whole(module: Any, _: Any) -> None:
    """peft's DoRA takes an 8-bit weight apart to read it, and leaves it without its scales."""
    if module.weight.CB is not None and module.weight.SCB is None:
        module.weight.CB = None
