"""Memory of one GPU for one step, counted without a GPU: the step itself runs on the meta device, where tensors have shapes and no content.

Forward and backward are those of training, of whatever model, method and objective; every storage that they make is counted while it
lives. What stands in for what only a GPU has: attention's kernel, which keeps its inputs, its output and a number a token, and never
the scores; and quantised layers, whose weights are counted at their size. Called by preflight.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.order import Step, share
from ..setup import Setup
from . import anatomy, attention
from .attention import Documents

META: Final = torch.device("meta")
_ROUND: Final = 512
"""Bytes that CUDA's allocator rounds up to."""


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
    training = _storages([masters.weights, masters.gradient, *masters.origin, *state])
    weights = _storages([*model.outer.parameters(), *model.outer.buffers()])
    largest = _largest(setup, world)
    masters.begin(setup.total_steps)
    with _on_a_gpu(setup), _Living() as living:
        batch = setup.objective.train_batch(setup.rows, largest, META, 0)
        loss = setup.objective.loss(model, batch)
        (loss / 1).backward()  # type: ignore[no-untyped-call]
    return Footprint(
        weights=sum(size for key, size in weights.items() if key not in training) - _saved_by_quantization(setup),
        training=sum(training.values()),
        activations=living.peak,
        tokens=None if setup.tokenizer is None else _tokens(setup, largest),
    )


def _largest(setup: Setup, world: int) -> Step:
    """The micro-batch of the first epoch with the most tokens, on whatever rank."""
    steps = setup.order.epoch(0)[: setup.total_steps]
    forwards = setup.spec.training.accumulation_steps
    batches = (
        batch
        for step in steps
        for rank in range(min(world, len(step)))
        for batch in share(step, rank, world, size=setup.micro_batch, forwards=forwards)
    )
    return max(batches, key=lambda batch: _tokens(setup, batch))


def _tokens(setup: Setup, batch: Step) -> int:
    return sum(int(setup.order.lengths[sequence].sum()) for sequence in batch)


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
    """Memory of flash attention, forward and backward, over tokens of (heads, size); keys may have fewer heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(..., tokens, heads, size) each, or heads before tokens."""
        out = torch.empty_like(query[..., : value.shape[-1]])
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The query's gradient is added up in fp32; those of shared keys are of each query head, then summed."""
        query, key, value, _, _ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)
        every = [torch.empty_like(query), torch.empty_like(query)] if query.numel() > key.numel() else []
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, every
        return found


def _kernel(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scaling: float | None, window: int | None) -> Tensor:
    out: Tensor = _Kernel.apply(q, k, v)
    return out


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Kernel.apply(query, key, value)
    return out


@contextmanager
def _on_a_gpu(setup: Setup) -> Iterator[None]:
    """Attention as a GPU has it, while it is counted."""
    ours, stock = attention._kernel, nn.functional.scaled_dot_product_attention
    attention._kernel, nn.functional.scaled_dot_product_attention = _kernel, _scaled_dot_product
    try:
        yield
    finally:
        attention._kernel, nn.functional.scaled_dot_product_attention = ours, stock


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
