"""Launch every Triton kernel through Triton's own compiler and launcher, on a driver that runs nothing (stub_driver_triton.cpp).

    python tests/triton_rehearsal.py FOLDER [--cost]

Compiles the stub into FOLDER, as libcuda.so.1, and puts it before Triton. Each call is made twice: the first launch of a
specialisation goes through Triton, the second past its binder. Both must hand to the driver the grid, the threads and the
bytes of every parameter that the call asked for. Prints a line per call, and exits with 1 when something was wrong.
With --cost it prints the host's microseconds instead, from the public call to its return: of a call without gradients, of
one with gradients, and of its backward.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels cannot be compiled

import launch_calls
import torch
import triton

import fastattn
from fastattn.runtime import gpu, launch

ARCH, SMS, STREAM = 90, 132, 0x5EA0
Tensor = torch.Tensor
Call = Callable[[], Any]


class Told(ctypes.Structure):
    """What the driver was told of a launch; the stub declares the same."""

    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("count", ctypes.c_uint),
        ("bytes", ctypes.c_uint),
        ("params", ctypes.c_ubyte * 1024),
    ]


def build(folder: Path) -> ctypes.CDLL:
    """The stub, loaded under the name by which Triton and its launchers look for the driver."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("triton_rehearsal: no C++ compiler")
    library = folder / "libcuda.so.1"
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("stub_driver_triton.cpp")
    command = [compiler, "-shared", "-fPIC", "-O1", f"-I{header}", "-Wl,-soname,libcuda.so.1", source, "-o", library]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.stub_launched.restype = ctypes.c_long
    loaded.stub_launch.restype = ctypes.POINTER(Told)
    loaded.stub_launch.argtypes = [ctypes.c_long]
    return loaded


def pretend() -> None:
    """CPU tensors pass for those of the only GPU, whose stream is STREAM."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: divmod(ARCH, 10)
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    gpu.current_device = lambda: -1  # the index of a CPU tensor's device
    gpu.stream_of = lambda device: STREAM
    launch.objections = lambda device: []
    launch.arch = lambda device: ARCH
    launch.sms = lambda device: SMS


class Watch:
    """Keeps what `launch.run` is asked for, and which launches go through Triton."""

    def __init__(self) -> None:
        self.asked: list[launch.Launch] = []
        self.through_triton = 0
        self._run, self._first = launch.run, launch._first
        launch.run, launch._first = self.run, self.first

    def run(self, kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Any, **options: int) -> None:
        warps, stages = options.get("num_warps", 4), options.get("num_stages", 2)
        self.asked.append(launch.Launch(kernel, grid, tensors, numbers, constants, warps, stages))
        self._run(kernel, grid, tensors, numbers, constants, **options)

    def first(self, *args: Any) -> Any:
        self.through_triton += 1
        return self._first(*args)


def expected(asked: launch.Launch) -> bytes:
    """The parameters of a launch: an address, an integer of four or eight bytes, a float; nothing for None and a one that
    is compiled in."""
    packed = b""
    for parameter, value in zip(asked.kernel.params, asked.args, strict=False):
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            continue
        if isinstance(value, Tensor):
            packed += struct.pack("<Q", value.data_ptr())
        elif isinstance(value, float):
            packed += struct.pack("<f", value)
        else:
            packed += struct.pack("<i" if -(1 << 31) <= value < 1 << 31 else "<q", value)
    return packed


def wrong(asked: launch.Launch, told: Told) -> list[str]:
    """What the driver was told that the call did not ask for."""
    params, wanted = bytes(told.params[: told.bytes]), expected(asked)
    pairs = {
        "kernel": (told.name.decode(), asked.kernel.__name__),
        "grid": (tuple(told.grid), (*asked.grid, 1, 1)[:3]),
        "threads": (told.block, 32 * asked.num_warps),
        "stream": (told.stream, STREAM),
        "attributes": (told.attributes, 0),
        "parameters": (params[: len(wanted)], wanted),
        "scratch": (params[len(wanted) :].strip(b"\0"), b""),
        "scratch pointers": (len(params) - len(wanted) in (0, 8, 16), True),
    }
    return [f"{asked.kernel.__name__}: {name} {got}, not {want}" for name, (got, want) in pairs.items() if got != want]


@triton.jit
def _probe(x):
    pass


def coarse_keys() -> list[str]:
    """Values that are one specialisation to us and several to Triton."""
    bind = _probe.device_caches[0][-1]
    wide = (1 << 31, 1 << 32, (1 << 40) + 8, -(1 << 31), -(1 << 31) - 1, -(1 << 40))
    whole = torch.zeros(64)
    tensors = [whole[n:].view(dtype) for n in (0, 1, 2, 4) for dtype in (torch.float32, torch.int32)]
    values = (*range(-33, 50), *wide, 0.0, 1.0, -2.5, None, *tensors)
    found: dict[Any, Any] = {}
    specialised = ((value, launch.class_of(value), bind(value)[1]) for value in values)
    return [
        f"{v!r}: {theirs}, not {found[ours]}"
        for v, ours, theirs in specialised
        if found.setdefault(ours, theirs) != theirs
    ]


def calls() -> Iterator[tuple[str, Call]]:
    """Small calls that between them launch every kernel."""

    def tensor(*size: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
        return torch.zeros(size, dtype=dtype, requires_grad=grad)

    def with_backward(function: Callable[..., Any], inputs: tuple[Tensor, ...], *args: Any, **options: Any) -> Call:
        def call() -> None:
            outs = function(*args, **options)
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.autograd.grad(outs, inputs, [torch.zeros_like(out) for out in outs])

        return call

    q, k, v = tensor(2, 48, 4, 64), tensor(2, 40, 2, 64), tensor(2, 40, 2, 64)
    inputs = (q, k, v)
    yield "attention", with_backward(fastattn.attention, inputs, *inputs, causal=True)
    bias, sinks = tensor(1, 4, 1, 40), tensor(4, dtype=torch.float32)
    more = {"bias": bias, "sinks": sinks, "dropout_p": 0.25}
    yield "attention with options", with_backward(fastattn.attention, (*inputs, bias, sinks), *inputs, **more)
    cu = torch.tensor([0, 16, 48], dtype=torch.int32)
    packed = tensor(48, 4, 64), tensor(48, 2, 64), tensor(48, 2, 64)
    yield "attention of packed sequences", with_backward(fastattn.attention, packed, *packed, cu_seqlens_q=cu)
    lse = tensor(2, 4, 48, dtype=torch.float32, grad=False)
    yield "attention_weights", lambda: fastattn.attention_weights(q.detach(), k.detach(), lse)

    softcap = itertools.cycle((30, 30.0))  # equal, and one kernel

    def decode() -> None:
        token, cache = tensor(2, 1, 4, 64, grad=False), tensor(8, 64, 2, 64, grad=False)
        table = torch.zeros(2, 4, dtype=torch.int32)
        cos, sin = torch.ones(256, 32), torch.zeros(256, 32)
        new = tensor(2, 1, 2, 64, grad=False)
        lengths = torch.tensor([5, 7], dtype=torch.int32)
        fastattn.attention_kvcache(
            token, cache, cache.clone(), lengths, k=new, v=new, block_table=table, cos=cos, sin=sin, num_splits=3,
            softcap=next(softcap),
        )  # fmt: skip

    yield "attention_kvcache", decode
    cos, sin, heads = torch.ones(48, 32), torch.zeros(48, 32), tensor(2, 48, 2, 64)
    yield "rope_qk", with_backward(fastattn.rope_qk, (q, heads), q, heads, cos, sin)
    weight, shift = tensor(64), tensor(64)
    x, residual = tensor(6, 64), tensor(6, 64)
    yield "rms_norm", with_backward(fastattn.rms_norm, (x, residual, weight), x, weight, residual=residual)
    yield "layer_norm", with_backward(fastattn.layer_norm, (x, weight, shift), x, weight, shift)
    long = tensor(3, 65536)
    scale = tensor(65536)
    yield "rms_norm of long rows", with_backward(fastattn.rms_norm, (long, scale), long, scale)


def rehearse(driver: ctypes.CDLL, watch: Watch, name: str, call: Call) -> list[str]:
    """Makes the call twice; what was wrong."""
    faults = []
    for repeat in (False, True):
        watch.asked.clear()
        watch.through_triton, before = 0, driver.stub_launched()
        call()
        told = [driver.stub_launch(n).contents for n in range(before, driver.stub_launched())]
        if len(told) != len(watch.asked) or not told:
            faults.append(f"{name}: {len(told)} launches, {len(watch.asked)} were asked for")
        for asked, at in zip(watch.asked, told, strict=False):
            faults += wrong(asked, at)
        if repeat and watch.through_triton:
            faults.append(f"{name}: {watch.through_triton} launches of the second call went through Triton")
    kernels = " ".join(asked.kernel.__name__ for asked in watch.asked)
    print(f"{name}: {kernels}", flush=True)
    return faults


def microseconds(call: Call) -> float:
    """The median of means over a second."""
    for _ in range(100):
        call()
    found, end = [], time.perf_counter() + 1
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(50):
            call()
        found.append(1e6 * (time.perf_counter() - start) / 50)
    return statistics.median(found)


def print_costs() -> None:
    torch.set_num_threads(1)
    with_gradients = launch_calls.calls(grad=True)
    for name, call in launch_calls.calls().items():
        found = [call]
        if name not in launch_calls.WITHOUT_BACKWARD:
            found += [with_gradients[name], launch_calls.backward_of(with_gradients[name]())]
        print(f"{name:24}", *(f"{microseconds(each):8.1f}" for each in found), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cost", action="store_true", help="print the host's microseconds instead")
    options = parser.parse_args()
    driver = build(options.folder)
    pretend()
    with fastattn.use_backend("triton"):
        if options.cost:
            print_costs()
            return 0
        watch = Watch()
        faults = coarse_keys()
        for name, call in calls():
            faults += rehearse(driver, watch, name, call)
    print("\n".join(faults))
    print(f"{driver.stub_launched()} launches, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
