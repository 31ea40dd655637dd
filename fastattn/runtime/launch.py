"""Launches Triton kernels: on a GPU with little host time, through the interpreter on CPU tensors, or into a record.

A backend calls `run` and never `kernel[grid]`. The first launch of a specialisation goes through Triton, which compiles
it; later ones reuse the compiled kernel by a key of our own, because Triton's binder costs more than our whole call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.runtime import gpu

Tensor = torch.Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "yes", "on", "y")
_INSTALLED = importlib.util.find_spec("triton") is not None
_OLDEST = (3, 6)
OPTIONS = {"enable_fp_fusion": True}  # of Triton's compiler, for all kernels: 3.10 will not fuse unless asked to


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what `fastattn.runtime.aot` needs to compile the kernel for any architecture."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int | float | None, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def args(self) -> tuple[Any, ...]:
        return *self.tensors, *self.numbers


@dataclass
class Recording:
    """Pretends to be a GPU of compute capability `arch` with `sms` multiprocessors; collects launches, runs nothing."""

    arch: int
    sms: int
    launches: list[Launch] = field(default_factory=list)


class _Codes(dict[torch.dtype, int]):
    """Each dtype as a multiple of 16, so that it and an address modulo 16 are one small number."""

    def __missing__(self, dtype: torch.dtype) -> int:
        self[dtype] = 16 * len(self)
        return self[dtype]


_recording: Recording | None = None
_codes = _Codes()
_MOST_EXACT = 1 << 14
_compiled: dict[tuple[Any, ...], Any] = {}  # by specialisation
_exact: dict[tuple[Any, ...], Any] = {}  # the same, by the numbers themselves: found sooner when a call is repeated


def objections(device: str) -> list[str]:
    """Why Triton kernels cannot serve tensors on `device` ("cpu", "cuda"); empty when they can."""
    found = [] if _INSTALLED else ["the package triton is not installed"]
    if device == "cuda":
        found += gpu.objections() + _too_old()
    elif device != "cpu":
        found.append(f"device cuda, got {device}")
    elif not INTERPRETED and _recording is None:
        found.append("device cuda, got cpu (with TRITON_INTERPRET=1 Triton's interpreter runs the kernels, slowly)")
    return found


@functools.cache
def _version() -> tuple[int, ...]:
    """Triton's, as in (3, 6, 0); empty when nobody can tell."""
    try:
        return tuple(int(n) for n in re.findall(r"\d+", importlib.metadata.version("triton"))[:3])
    except importlib.metadata.PackageNotFoundError:
        return ()


def _too_old() -> list[str]:
    """Says so of a Triton older than the kernels were written for; one whose version nobody can tell is tried."""
    found = _version()
    if not found or found >= _OLDEST:
        return []
    return [f"triton {'.'.join(map(str, _OLDEST))} or newer, got {'.'.join(map(str, found))}"]


def arch(device: torch.device) -> int:
    """Compute capability as in sm_90: 90. Interpreted kernels are tuned like the lowest architecture."""
    if _recording is not None:
        return _recording.arch
    return gpu.LOWEST_ARCH if device.type == "cpu" else gpu.arch_of(gpu.index_of(device))


def sms(device: torch.device) -> int:
    """The number of streaming multiprocessors."""
    if _recording is not None:
        return _recording.sms
    return 1 if device.type == "cpu" else gpu.sms_of(gpu.index_of(device))


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up. Triton's own function of this name costs the host microseconds, like the next."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@contextlib.contextmanager
def recording(arch: int, sms: int = 132) -> Iterator[Recording]:
    """Within the block launches are collected instead of run, and CPU tensors pass for those of such a GPU."""
    global _recording
    if INTERPRETED:
        raise RuntimeError("launch: recording needs kernels that can be compiled, but TRITON_INTERPRET is set")
    before, _recording = _recording, Recording(arch, sms)
    try:
        yield _recording
    finally:
        _recording = before


def run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float | None, ...],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Launch `kernel` on the current stream of the device of its first tensor.

    tensors    for the kernel's first parameters, in order
    numbers    for the next ones; None where an option is absent, as among the tensors
    constants  its tl.constexpr parameters by name, which stand last and in the order given here
    An empty grid launches nothing.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, tensors, numbers, constants, num_warps, num_stages))
        return
    if INTERPRETED:
        kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps, num_stages=num_stages)
        return
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device != gpu.current_device():
        with torch.cuda.device(device):
            run(kernel, grid, tensors, numbers, constants, num_warps=num_warps, num_stages=num_stages)
        return
    values = tuple(constants.values())
    addresses: list[int | None] = []
    kinds: list[int | None] = []
    for t in tensors:
        if t is None:
            addresses.append(None)
            kinds.append(None)
        else:
            address = t.data_ptr()
            addresses.append(address)
            kinds.append(_codes[t.dtype] + (address & 15))
    exact = (id(kernel), device, num_warps, num_stages, values, numbers, *kinds)
    known = _exact.get(exact)
    if known is None or _profiled():
        args = (*tensors, *numbers)
        key = (id(kernel), device, num_warps, num_stages, values, *map(class_of, args))
        known = _compiled.get(key)
        if known is None or _profiled():
            _compiled[key] = _first(kernel, grid, args, constants, num_warps, num_stages)
            return
        if len(_exact) >= _MOST_EXACT:
            _exact.clear()
        _exact[exact] = known
    launcher, fixed, _ = known  # for a tensor Triton would ask for its address once more, and the driver what that is
    x, y, z = (*grid, 1, 1)[:3]
    launcher(x, y, z, gpu.stream_of(device), *fixed, *addresses, *numbers, *values)


def _first(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> tuple[Any, tuple[Any, ...], Any]:
    """Launch through Triton, which compiles. For later launches: the launcher, what it takes between the stream and the
    kernel's arguments, and the compiled kernel, which must live on: Triton 3.8 unloads one that nobody holds."""
    if kernel.arg_names[len(args) :] != list(constants):  # a later launch passes them by position
        raise RuntimeError(
            f"launch: the constants of {kernel.__name__} must be {kernel.arg_names[len(args) :]} in order"
        )
    how = {"num_warps": num_warps, "num_stages": num_stages, **OPTIONS}
    compiled = kernel[grid](*args, **constants, **how)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if _version()[:2] == (3, 6) and not run.global_scratch_size and not run.profile_scratch_size:  # its own C function
        fixed = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)
        return run.launch, fixed, compiled
    return run, (function, metadata, None, None, None), compiled


def class_of(arg: Any) -> Any:
    """At least as fine as what Triton specialises on: dtype and alignment, one, multiples of 16, width of integers."""
    kind = type(arg)
    if kind is int:
        if arg == 1:
            return 1
        wide = not -0x80000000 <= arg < 0x80000000
        return (2 if arg & 15 else 16) + wide
    if arg is None or kind is float:
        return kind
    return arg.dtype, arg.data_ptr() & 15


def _profiled() -> bool:
    """Triton's launch hooks (its profiler) must see every launch."""
    hook = _knobs().launch_enter_hook
    return bool(getattr(hook, "calls", hook))


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs.runtime
