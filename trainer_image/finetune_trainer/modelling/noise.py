"""NEFTune: noise on the embeddings of training rows (Jain et al. 2023). Called by models."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def on_embeddings(inner: Any, lengths: Sequence[int], alpha: float) -> Iterator[None]:
    """Adds uniform noise in +-alpha / sqrt(tokens x width) to what the embedding gives, tokens being those of each row. Virtual tokens have none, as
    with peft and transformers: they are no text.

    Args:
        inner: the transformers model.
        lengths: tokens of each row of the flat batch.
        alpha: 0: no noise.
    """
    if not alpha:
        yield
        return

    def add(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
        sizes = [alpha / math.sqrt(length * embedded.shape[2]) for length in lengths]
        each = torch.repeat_interleave(torch.tensor(sizes), torch.tensor(lengths)).to(embedded.device, embedded.dtype)
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * each[None, :, None]

    hook = inner.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
