"""Where an op gets its outputs, gradients too: torch.empty, or for large CPU tensors our bounded cache of huge pages.

glibc gives blocks above 32 MB back to the system at every free, and smaller ones at the end of its heap, so that a fresh
large output costs more in page faults than a memory-bound kernel needs in all. FASTATTN_HUGEPAGES=0 switches the cache
off; csrc/hugepages.cpp has the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastattn.runtime import native

THRESHOLD = 4 << 20  # csrc/tensor.h, kHugeTensorBytes
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 6}  # csrc/tensor.h, Dtype


def _cached(dtype: torch.dtype, device: torch.device) -> bool:
    """Does the cache serve this kind of tensor, and is it on?"""
    if device.type != "cpu" or dtype not in _CODES or native.error() is not None:
        return False
    return native.module().hugepages() and native.module().has_exchange_api()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor."""
    if math.prod(shape) * dtype.itemsize >= THRESHOLD and _cached(dtype, device):
        stride, numel = [1] * len(shape), 1
        for i in range(len(shape) - 1, -1, -1):
            stride[i], numel = numel, numel * shape[i]
        return native.module().empty(list(shape), _CODES[dtype], stride)
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor with x's shape and order of strides, as torch.empty_like gives."""
    if x.numel() * x.element_size() >= THRESHOLD and _cached(x.dtype, x.device):
        stride = torch.empty_like(x, device="meta").stride()
        return native.module().empty(list(x.shape), _CODES[x.dtype], list(stride))
    return torch.empty_like(x)


def release_cache() -> int:
    """Give the cached blocks back to the system; returns how many bytes."""
    return 0 if native.error() is not None else native.module().release_hugepages()
