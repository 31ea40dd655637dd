"""Facts about the GPUs that torch sees, and torch's current device and stream, at little cost to the host."""

from __future__ import annotations

import functools
from typing import Any

import torch

LOWEST_ARCH = 80
# Shared memory that one block may use, in bytes (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)  # absent from builds of torch without CUDA
stream_of: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device's index: the handle as an int


def objections() -> list[str]:
    """Why no kernel of ours can run on torch's GPUs; empty when it can."""
    if not torch.cuda.is_available():
        return ["a GPU, and torch finds none"]
    if lowest_arch() < LOWEST_ARCH:
        return [f"a GPU of compute capability 8.0 or newer, got {lowest_arch() / 10}"]
    return []


def shared_limit(arch: int) -> int:
    """Bytes; an architecture that is not in the table is taken for one of the small ones."""
    return SHARED_LIMIT.get(arch, 99 << 10)


@functools.cache
def lowest_arch() -> int:
    return min(arch_of(i) for i in range(torch.cuda.device_count()))


@functools.cache
def arch_of(index: int) -> int:
    """Compute capability as in sm_90: 90."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def sms_of(index: int) -> int:
    """The number of streaming multiprocessors."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
