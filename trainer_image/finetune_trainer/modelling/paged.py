"""Vectors in CUDA's managed memory: the driver moves their pages to the host when other allocations need the device's memory, and back when
they are touched. Called by optimizers.

bitsandbytes allocates it and returns a tensor of the host, which torch computes with on the host only; seen through the CUDA array
interface the same bytes are a tensor of the device like any other, for torch's kernels and for bitsandbytes'. It is never given back
before the process ends.
"""

from typing import Any

import torch
from torch import Tensor


class _OnDevice:
    """The bytes of a managed host tensor as the device sees them; keeps that tensor alive."""

    def __init__(self, host: Tensor) -> None:
        self._host = host
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def zeros_like(like: Tensor, *, dtype: torch.dtype) -> Tensor:
    """A vector of zeros as long as `like`, on its device."""
    from bitsandbytes import functional

    if like.is_meta:
        return torch.zeros_like(like, dtype=dtype)
    if like.device.type != "cuda":
        raise ValueError("training.optimizer.adamw.paged is for GPUs")
    size: Any = like.numel() * dtype.itemsize
    host = functional.get_paged(size, dtype=torch.uint8, device=like.device)
    return torch.as_tensor(_OnDevice(host), device=like.device).view(dtype).zero_()


def fetch(part: Tensor) -> None:
    """Has the pages of a vector's part moved to its device, all at once and behind the work that is queued: page by page is slower."""
    from bitsandbytes import functional

    part.is_paged, part.page_deviceid = True, part.device.index  # type: ignore[attr-defined]
    functional.prefetch_tensor(part)
