"""Memory of one GPU for one step, counted without a GPU: the step itself runs on the meta device, where tensors have shapes and no content.

Forward and backward are those of training, of whatever model, method and objective; every storage that they make is counted while it
lives. What stands in for what only a GPU has: attention's kernels, which keep their inputs, their output, a number a token and a mask
padded to their liking, and never the scores; dropout that keeps a byte for each number; quantised layers, whose weights are counted at
their size; and the workspaces of matrix products. Compared with GPUs by bench/gpu_tasks.py. Called by preflight.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.order import Step, share
from ..setup import Setup
from . import anatomy

META: Final = torch.device("meta")
_ROUND: Final = 512
"""Bytes that CUDA's allocator rounds up to."""
_WORKSPACES: Final = 2 * 32 * 2**20
"""Bytes of cuBLAS's workspaces, as ranks.make_repeatable asks for them: the threads that go forward and backward have one each."""
_ALIGNED: Final = 8
"""Keys that attention with a mask takes at a time: a mask of another width is copied to one that is padded."""
_COPYING: Final = frozenset({torch.ops.aten.logsumexp.default})
"""Operations that hold a copy of their input for a while."""


class Footprint(NamedTuple):
    """Bytes."""

    weights: int
    training: int
    activations: int
    tokens: int | None
    """Of the micro-batch that was counted."""

    @property
    def total(self) -> int:
        """Peak."""
        return self.weights + self.training + self.activations


def of(setup: Setup, world: int) -> Footprint:
    """The footprint of the largest micro-batch of the first epoch.

    Args:
        setup: loaded on the meta device.
        world: ranks that share a step.

    Raises:
        NotImplementedError, RuntimeError: something in the step asks for a tensor's content.
    """
    masters, model = setup.masters, setup.model
    paged = setup.spec.training.optimizer.adamw.paged
    state = [] if paged else [*masters.optimizer.moments.values(), *masters.optimizer.scales.values()]
    training = _storages([masters.weights, masters.gradient.vector, *masters.origin, *state])
    weights = _storages([*model.outer.parameters(), *model.outer.buffers()])
    own, micro_batch = _largest(setup, world)
    masters.begin(setup.total_steps)
    workspaces = _rounded(_WORKSPACES)
    with _on_a_gpu(), _unpacking(setup):
        with _Living() as beginning:
            setup.objective.imagine_beginning(model, setup.rows, own, META)
        with _Living() as living:
            batch = setup.objective.imagined_batch(setup.rows, micro_batch, META)
            loss = setup.objective.loss(model, batch)
            (loss / 1).backward()  # type: ignore[no-untyped-call]
    return Footprint(
        weights=sum(size for key, size in weights.items() if key not in training) - _saved_by_quantization(setup),
        training=sum(training.values()),
        activations=workspaces + max(beginning.peak, living.peak),
        tokens=None if setup.tokenizer is None else setup.objective.extent(setup.rows, np.concatenate(micro_batch)),
    )


def _largest(setup: Setup, world: int) -> tuple[list[Step], Step]:
    """The largest micro-batch of the first epoch, on whatever rank, behind all of that rank in that step."""
    steps = setup.order.epoch(0)[: setup.total_steps]
    forwards = setup.spec.training.accumulation_steps
    shares = (
        share(step, rank, world, size=setup.micro_batch, forwards=forwards)
        for step in steps
        for rank in range(min(world, len(step)))
    )
    return max(((own, batch) for own in shares for batch in own), key=lambda found: extent(setup, found[1]))


def extent(setup: Setup, micro_batch: Step) -> int:
    """Tokens that gradients of a micro-batch go through, virtual ones included."""
    virtual = setup.spec.method.prompt or setup.spec.method.p_tuning
    ids = np.concatenate(micro_batch)
    return setup.objective.extent(setup.rows, ids) + ((virtual and virtual.length) or 0) * len(ids)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage: tied weights and views count once."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: _rounded(storage.nbytes()) for storage in found}


def _rounded(size: int) -> int:
    return -(-size // _ROUND) * _ROUND


class _Living(TorchDispatchMode):
    """Counts the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # transformers asks whether a mask masks nothing, to go without
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._note(leaf.untyped_storage(), given)
        if func in _COPYING:
            self.peak = max(self.peak, self.now + _rounded(args[0].nbytes))
        return out

    def _note(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, _rounded(storage.nbytes())
        if key in self._known or key in given:  # known, or a view of what was there before
            return
        self._known[key] = weakref.ref(storage, lambda _: self._freed(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class _Kernel(torch.autograd.Function):
    """Memory of a fused kernel of attention, forward and backward, over tokens of (heads, size); keys may have fewer heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(..., tokens, heads, size) each, or heads before tokens."""
        out = torch.empty_like(query[..., : value.shape[-1]])
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The query's gradient is added up in fp32; those of shared keys are of each query head, then summed."""
        query, key, value, mask, _, _ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)
        every = [torch.empty_like(query), torch.empty_like(query)] if query.numel() > key.numel() else []
        found = [torch.empty_like(each) for each in (query, key, value)]
        of_mask = mask.new_empty(mask.shape) if ctx.needs_input_grad[3] else None
        del sums, every
        return *found, of_mask


def _varlen(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Kernel.apply(query, key, value, None)
    return out


def _scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        keys = attn_mask.shape[-1]
        if keys % _ALIGNED:
            attn_mask = F.pad(attn_mask, (0, -keys % _ALIGNED))[..., :keys]
        attn_mask = attn_mask.expand(*query.shape[:-1], keys)
    out: Tensor = _Kernel.apply(query, key, value, attn_mask)
    return out


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


@contextmanager
def _on_a_gpu() -> Iterator[None]:
    """What runs on a GPU as it is there, while it is counted."""
    replaced = (
        (varlen, "varlen_attn", _varlen),
        (F, "scaled_dot_product_attention", _scaled_dot_product),
        (F, "dropout", _dropout),
    )
    stock = [getattr(module, name) for module, name, _ in replaced]
    for module, name, ours in replaced:
        setattr(module, name, ours)
    try:
        yield
    finally:
        for (module, name, _), theirs in zip(replaced, stock, strict=True):
            setattr(module, name, theirs)


@contextmanager
def _unpacking(setup: Setup) -> Iterator[None]:
    """What a quantised layer holds for a while: of 4 bits its weight in 16, of 8 bits its input in 8 and its products in 32 and 16."""
    qlora = setup.spec.method.qlora
    eight = bool(qlora and qlora.bits == 8)

    def hold(module: nn.Linear, given: tuple[Tensor, ...], out: Tensor) -> None:
        held: list[Any] = []
        if eight:
            held += [torch.empty_like(given[0], dtype=torch.int8)]
            held += [torch.empty_like(out, dtype=each) for each in (torch.int32, torch.float16)]
        else:
            held += [torch.empty_like(module.weight)]
        del held

    hooks = [module.register_forward_hook(hold) for module in _quantized(setup)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _quantized(setup: Setup) -> Iterator[nn.Linear]:
    """The layers that bitsandbytes would quantise: those without a gradient, but the heads."""
    if setup.spec.method.qlora is None:
        return
    heads = set(anatomy.heads(setup.model.inner.config.model_type))
    for name, module in setup.model.inner.named_modules():
        if (
            isinstance(module, nn.Linear)
            and not module.weight.requires_grad
            and not heads.intersection(name.split("."))
        ):
            yield module


def _saved_by_quantization(setup: Setup) -> int:
    """Bytes. NF4 with a scale of fp32 for 64 weights, or one of 8 bits and of those one of fp32 for 256; 8 bits with a scale a row."""
    saved = 0
    for module in _quantized(setup):
        qlora = setup.spec.method.qlora
        assert qlora
        number = module.weight.numel()
        if qlora.bits == 8:
            own = number + 4 * module.out_features
        else:
            scales = number // 64
            own = number // 2 + (scales + scales // 64 if qlora.double_quantization else 4 * scales)
        saved += number * module.weight.element_size() - own
    return saved
