"""Runs launches of CUDA C++ kernels on CPU tensors."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn.runtime import cuda

from . import build

# Who runs only when nobody else can: of the lot that the seed draws a lane, the lane of that number in every warp, a warp, …;
# or all but these.
LAGS = ("nobody", "lane", "lanes", "warp", "warpgroup", "block")
ENGINES = 128  # mbarriers, multiplying warps and bulk-storing threads that a block may have
_ALL_BUT = 16  # added to the number of who does not lag
_MAGIC = 0x70616D726F736E74
_lock = threading.Lock()
_Ask = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint, ctypes.c_uint)


class EmulatorError(RuntimeError):
    """A kernel did what a GPU does not allow, or leaves to chance."""


class _Bounds(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_uint), ("blocks", ctypes.c_uint))


class _Storage(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("allowed", ctypes.c_void_p),
        ("granule", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    )


def run(launch: cuda.Launch, seed: int = 0, folder: Path | None = None, together: int = 1, lag: str = "nobody") -> None:
    """Execute every block of the grid. Raises EmulatorError where the kernel is at fault.

    seed: of the order in which threads run; folder: where the kernel's file lies, if not in csrc/cuda; together: so many
    blocks (up to 16) of a kernel without clusters run at the same time, or as many fewer as divide the grid;
    lag: who lags, one of LAGS or "all but " and one of them
    """
    kernel = launch.kernel
    path = build.library(kernel, folder)
    library = build.load(path)
    size = ctypes.c_ulong.in_dll(library, "emulator_params_size").value
    if size != kernel.layout.size:
        raise EmulatorError(
            f"{kernel}: its parameters have {size} bytes, {kernel.layout.name} has {kernel.layout.size}"
        )
    bounds = _Bounds.in_dll(library, "emulator_bounds")
    _check_limits(launch, bounds)
    cluster = kernel.cluster
    if cluster == 1:
        cluster = next(n for n in range(min(together, 16), 0, -1) if launch.grid[0] % n == 0)
    storages, kept = _storages(launch)
    values = [_encoded(v) if isinstance(v, cuda.TensorMap) else v for v in launch.values]
    packed = ctypes.create_string_buffer(kernel.layout.pack(values), size + 64)
    params = ctypes.addressof(packed) + -ctypes.addressof(packed) % 64
    ctypes.memmove(params, bytes(packed[:size]), size)
    sizes = (ctypes.c_uint * 6)(*launch.grid, kernel.threads, 1, 1)
    ask = _Ask(lambda a, b: build.places(path, a) == build.places(path, b))
    library.emulator_run.restype = ctypes.c_char_p
    with _lock:
        fault = library.emulator_run(
            ctypes.c_void_p(params),
            sizes,
            cluster,
            kernel.shared,
            _registers(bounds),
            seed,
            ENGINES * cluster if kernel.hopper or kernel.cluster > 1 else 0,
            LAGS.index(lag.removeprefix("all but ")) + (_ALL_BUT if lag.startswith("all but ") else 0),
            storages,
            len(storages),
            ask,
        )
    del kept
    if fault is not None:
        text = re.sub(r"\{0x([0-9a-f]+)\}", lambda m: _site(path, int(m[1], 16)), fault.decode())
        raise EmulatorError(f"{kernel}: {text}")


def _registers(bounds: _Bounds) -> int:
    """That a thread has at first, at most: a multiprocessor has 65536, in portions of 8 (what ptxas does with this bound)."""
    return min(255, 65536 // (bounds.threads * max(1, bounds.blocks)) // 8 * 8)


def _check_limits(launch: cuda.Launch, bounds: _Bounds) -> None:
    """What no GPU would launch."""
    kernel, (x, y, z) = launch.kernel, launch.grid
    limits = (
        (
            kernel.shared <= 227 * 1024,
            f"{kernel.shared} bytes of shared memory, of which a block has at most {227 * 1024}",
        ),
        (1 <= kernel.threads <= 1024, f"{kernel.threads} threads, of which a block has 1 to 1024"),
        (
            kernel.threads <= bounds.threads,
            f"{kernel.threads} threads, of which its __launch_bounds__ allow {bounds.threads}",
        ),
        (1 <= kernel.cluster <= 16, f"clusters of {kernel.cluster} blocks, which have 1 to 16"),
        (x % kernel.cluster == 0, f"a grid of {launch.grid}, which does not divide into clusters of {kernel.cluster}"),
        (x < 1 << 31 and y < 1 << 16 and z < 1 << 16, f"a grid of {launch.grid}, of which y and z are below 65536"),
    )
    for holds, words in limits:
        if not holds:
            raise EmulatorError(f"{kernel}: {words}")


def _site(path: Path, pc: int) -> str:
    places = build.places(path, pc)
    return ", called from ".join(places) if places else hex(pc)


def _encoded(m: cuda.TensorMap) -> bytes:
    """The 128 bytes that runtime/tma.cpp reads, in place of what the driver would encode."""
    m.check()
    item = m.tensor.element_size()
    strides = [item, *(s * item for s in m.strides)]

    def five(numbers: Sequence[int]) -> list[int]:
        return [*numbers, *[0] * (5 - len(numbers))]

    return struct.pack(
        "<QQIIII5Q5Q8H",
        *(_MAGIC, m.tensor.data_ptr(), len(m.sizes), item, m.type_code, m.swizzle),
        *(*five(m.sizes), *five(strides), *five(m.box), 0, 0, 0),
    )


def _tensors(launch: cuda.Launch) -> list[tuple[str, torch.Tensor]]:
    """The tensors among the values, and what the maps among them cover."""
    found = []
    for (name, _, _), v in zip(launch.kernel.layout.fields, launch.values, strict=True):
        if isinstance(v, torch.Tensor):
            found.append((name, v))
        elif isinstance(v, cuda.TensorMap):
            sizes, strides = v.sizes[::-1], (*v.strides[::-1], 1)
            found.append((name, v.tensor.as_strided(sizes, strides, v.tensor.storage_offset())))
    return found


def _storages(launch: cuda.Launch) -> tuple[Any, list[Any]]:
    """What the kernel may touch: of each storage the bytes that lie within a tensor's extent may be read, and those of
    its elements written. The second result keeps the first one's memory alive."""
    found: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, t in _tensors(launch):
        if t.numel():
            found.setdefault(t.untyped_storage().data_ptr(), []).append((name, t))
    array, kept = (_Storage * len(found))(), []
    for entry, (begin, tensors) in zip(array, found.items(), strict=True):
        size = tensors[0][1].untyped_storage().nbytes()
        allowed = torch.zeros(size, dtype=torch.uint8)
        for _, t in tensors:
            first = t.storage_offset() * t.element_size()
            extent = (
                sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) * t.element_size() + t.element_size()
            )
            allowed[first : first + extent] |= 1
        for _, t in tensors:
            strides = [s * t.element_size() for s in t.stride()]
            allowed.as_strided(
                (*t.shape, t.element_size()), (*strides, 1), t.storage_offset() * t.element_size()
            ).fill_(3)
        name = " / ".join(f"{name} ({str(t.dtype)[6:]} {list(t.shape)})" for name, t in tensors).encode()
        granule = min(t.element_size() for _, t in tensors)
        entry.begin, entry.bytes, entry.allowed = begin, size, allowed.data_ptr()
        entry.granule, entry.name = granule, name
        kept += [allowed, name]
    return array, kept
