"""Launches the CUDA C++ kernels: on a GPU, through an emulator that a test has put in place, or into a record.

A backend names a `Kernel` (one specialisation of a template) and hands over the values of its parameter struct; `jit`
compiles it when it is first used on a device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastattn.runtime import gpu, jit, native, params


@dataclass(frozen=True, eq=False)
class Kernel:
    """`name<constants>` of csrc/cuda/`file`, whose one parameter is the struct `layout`.

    constants  template arguments as C++ writes them: ("bf16", "128", "true")
    threads    per block; shared: bytes of dynamic shared memory per block; cluster: blocks per cluster
    hopper     needs sm_90a and no other architecture
    """

    file: str
    name: str
    constants: tuple[str, ...]
    layout: params.Layout
    threads: int
    shared: int = 0
    cluster: int = 1
    hopper: bool = False

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.constants)}>"


@functools.cache
def kernel(
    file: str,
    name: str,
    constants: tuple[str, ...],
    layout: tuple[str, str],
    threads: int,
    shared: int = 0,
    cluster: int = 1,
    hopper: bool = False,
) -> Kernel:
    """The one Kernel of these facts; `layout` is (header, struct)."""
    return Kernel(file, name, constants, params.layout(*layout), threads, shared, cluster, hopper)


# Element types as template arguments.
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}


class TensorMap(NamedTuple):
    """What a TMA descriptor says, for a `TensorMap` field of a parameter struct. Everything is listed innermost first, as
    the coordinates of cp.async.bulk.tensor are.

    tensor   gives the address of element (0, …, 0) and the type of the elements
    sizes    elements per dimension, of which there are 1 to 5; copies from outside of them read zeros
    strides  in elements, of the dimensions after the innermost, whose stride is 1 and is not listed
    box      elements per dimension that one copy moves
    swizzle  0, 32, 64 or 128: the span in bytes over which 16-byte pieces are exchanged in shared memory
    """

    tensor: torch.Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0

    @property
    def type_code(self) -> int:
        return MAP_TYPES[self.tensor.dtype]

    def check(self) -> None:
        """Raises ValueError with the rule of the driver (cuTensorMapEncodeTiled) that is broken."""
        bytes_each, rank, box = self.tensor.element_size(), len(self.sizes), self.box
        row = box[0] * bytes_each if box else 0
        rules = (
            (self.tensor.dtype in MAP_TYPES, "dtype", f"one that TMA knows, got {self.tensor.dtype}"),
            (1 <= rank <= 5, "sizes", f"of rank 1 to 5, got {self.sizes}"),
            (len(self.strides) == rank - 1, "strides", f"one fewer than sizes, got {len(self.strides)} for {rank}"),
            (len(box) == rank, "box", f"as long as sizes, got {len(box)} for {rank}"),
            (self.tensor.data_ptr() % 16 == 0, "tensor", "at an address that is a multiple of 16 bytes"),
            (all(1 <= n <= 1 << 31 for n in self.sizes), "sizes", f"of 1 to 2^31 each, got {self.sizes}"),
            (
                all(0 < n * bytes_each < 1 << 40 and n * bytes_each % 16 == 0 for n in self.strides),
                "strides",
                f"multiples of 16 bytes below 2^40, got {self.strides} of {bytes_each} bytes",
            ),
            (all(1 <= n <= 256 for n in box), "box", f"of 1 to 256 each, got {box}"),
            (self.swizzle in (0, 32, 64, 128), "swizzle", f"0, 32, 64 or 128, got {self.swizzle}"),
            (row % 16 == 0, "box[0]", f"a multiple of 16 bytes, got {row}"),
            (not self.swizzle or row <= self.swizzle, "box[0]", f"within the swizzle of {self.swizzle} B, got {row} B"),
        )
        for holds, name, expected in rules:
            if not holds:
                raise ValueError(f"TensorMap: {name} must be {expected}")


# As the driver numbers them (CUtensorMapDataType).
MAP_TYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    grid: tuple[int, int, int]
    values: tuple[Any, ...]


@dataclass
class Recording:
    """Pretends to be a GPU of compute capability `arch` with `sms` multiprocessors; collects launches, runs nothing."""

    arch: int
    sms: int
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None
emulator: Callable[[Launch], None] | None = None  # put in place by tests: takes launches on CPU tensors
EMULATED_ARCH, EMULATED_SMS = 90, 4
_portable = False


def objections(device: str) -> list[str]:
    """Why these kernels cannot serve tensors on `device` ("cpu", "cuda"); empty when they can."""
    if _recording is not None or (emulator is not None and device == "cpu"):
        return []
    if device != "cuda":
        return [f"device cuda, got {device}"]
    return list(missing())


@functools.cache
def missing() -> tuple[str, ...]:
    """What this machine lacks."""
    found = gpu.objections()
    if native.error() is not None:
        found.append(f"the launcher in the native module: {native.error()}")
    elif error := native.module().driver_error():
        found.append(error)
    if error := jit.error():
        found.append(error)
    return tuple(found)


def arch(device: torch.device) -> int:
    """Compute capability as in sm_90: 90."""
    if _recording is not None:
        return _recording.arch
    return EMULATED_ARCH if device.type == "cpu" else gpu.arch_of(gpu.index_of(device))


def hopper(device: torch.device) -> bool:
    """May kernels be chosen that only sm_90a can run?"""
    return not _portable and arch(device) == 90


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within the block no kernel is chosen that only Hopper has: to test and compare those that every GPU runs."""
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def sms(device: torch.device) -> int:
    """The number of streaming multiprocessors."""
    if _recording is not None:
        return _recording.sms
    return EMULATED_SMS if device.type == "cpu" else gpu.sms_of(gpu.index_of(device))


@contextlib.contextmanager
def recording(arch: int, sms: int = 132) -> Iterator[Recording]:
    """Within the block launches are collected instead of run, and CPU tensors pass for those of such a GPU."""
    global _recording
    before, _recording = _recording, Recording(arch, sms)
    try:
        yield _recording
    finally:
        _recording = before


def run(kernel: Kernel, grid: tuple[int, int, int], values: Sequence[Any], device: torch.device) -> None:
    """Launch on the current stream of `device`. An empty grid launches nothing.

    values: one per field of the kernel's parameter struct, in the order of its declaration, arrays flattened:
    int, float, tensor (its address), None (a null pointer), TensorMap.
    """
    if 0 in grid:
        return
    if _recording is None and device.type == "cuda":
        index = gpu.index_of(device)
        _launch_kernel(loaded(kernel, index), gpu.stream_of(index), grid, values)
    elif _recording is not None:
        _recording.launches.append(Launch(kernel, grid, tuple(values)))
    elif emulator is not None:
        emulator(Launch(kernel, grid, tuple(values)))
    else:
        raise RuntimeError(f"cuda: {kernel} runs on a GPU, got tensors on {device}")


_launch_kernel: Any = getattr(native.module(), "launch_kernel", None) if native.error() is None else None


@functools.cache
def loaded(kernel: Kernel, index: int) -> Any:
    """`kernel` compiled for and loaded on that GPU."""
    built = jit.load(kernel, jit.target(kernel, gpu.arch_of(index)))
    layout = kernel.layout
    return native.module().load_kernel(
        image=built.image,
        name=built.name,
        label=str(kernel),
        device=index,
        threads=kernel.threads,
        shared=kernel.shared,
        cluster=kernel.cluster,
        bytes=layout.size,
        fields=layout.fields,
    )
