"""Launches the CUDA C++ kernels: on a GPU, through an emulator that a test has put in place, or into a record.

A backend names a `Kernel` (one specialisation of a template) and hands over the values of its parameter struct; `jit`
compiles it when it is first used on a device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.runtime import params


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
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, tuple(values)))
        return
    if emulator is not None and device.type == "cpu":
        emulator(Launch(kernel, grid, tuple(values)))
        return
    raise NotImplementedError
