"""torch's CUDA build on GPUs that are the memory of the host; see README.md.

build(folder)   compile the stand-ins for libcudart and libcuda
begin(folder)   before torch is imported: from now on there are two GPUs of compute capability 9.0
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_STANDINS = {"libcudart.so.13": "cudart.cpp", "libcuda.so.1": "driver.cpp"}
_COPY, _FILL, _END, _LAUNCH = range(4)  # as in cudart.cpp
_OnCapture = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_kept: list[Any] = []  # in force while somebody holds them

Again = Callable[[], Any]


def build(folder: Path) -> None:
    """Raises RuntimeError where the compiler or NVIDIA's headers are missing."""
    headers = [p for root in map(Path, sys.path) for p in root.glob("nvidia/cu13/include") if (p / "crt").exists()]
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not headers:
        raise RuntimeError(
            "cuda_rehearsal: needs a C++ compiler and the wheels nvidia-cuda-runtime and nvidia-cuda-crt of CUDA 13"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in _STANDINS.items():
        exports = folder / f"{name}.map"
        version = name if "cudart" in name else ""  # its symbols have one
        # No more than that: NVRTC, for one, would find parts of the C++ library here.
        exports.write_text(f"{version} {{ global: cu*; __cuda*; stub_*; rehearsal_*; local: *; }};\n")
        command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{headers[0]}", f"-Wl,-soname,{name}"]
        command += [f"-Wl,--version-script={exports}", str(_HERE / source), "-o", str(folder / name)]
        subprocess.run(command, check=True)


def begin(folder: str) -> None:
    """torch finds the stand-ins. Its operators are served by its CPU kernels on the same memory. Our CUDA C++ kernels go
    through NVRTC and the launcher to the driver, which does nothing, and are then executed by the emulator. Triton's are
    interpreted.
    """
    if "torch" in sys.modules:
        raise RuntimeError("cuda_rehearsal: torch is imported already, with the CUDA runtime that it found")
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TRITON_LIBCUDA_PATH"] = folder  # Inductor asks Triton for the GPU
    runtime, _ = (ctypes.CDLL(str(Path(folder).absolute() / name), mode=ctypes.RTLD_GLOBAL) for name in _STANDINS)
    graphs = Graphs(runtime)

    import interpreter

    from . import host_ops

    interpreter.mend()
    atexit.register(time.sleep, 0.2)  # autograd's threads run Python here, and must have left it when it ends
    _kept.extend((graphs, host_ops.begin(graphs.recorded)))
    _execute(graphs)


class Graphs:
    """What a stream is given while it is captured, kept by graph, and done whenever the graph is launched."""

    def __init__(self, runtime: ctypes.CDLL) -> None:
        self._runtime = runtime
        self._recorded: list[Again] = []
        self._graphs: dict[int, list[Again]] = {}
        self._function = _OnCapture(self._told)
        runtime.rehearsal_on_capture(self._function)

    def recorded(self) -> list[Again] | None:
        """Of the capture that is going on; None when there is none."""
        return self._recorded if self._runtime.rehearsal_capturing() else None

    def _told(self, what: int, dst: int, src: int, count: int, value: int) -> None:
        if what == _COPY:
            self._recorded.append(lambda: ctypes.memmove(dst, src, count))
        elif what == _FILL:
            self._recorded.append(lambda: ctypes.memset(dst, value, count))
        elif what == _END:
            self._graphs[dst], self._recorded = self._recorded, []
        else:
            for again in self._graphs[dst]:
                again()


def _execute(graphs: Graphs) -> None:
    """Behind every launch of a CUDA C++ kernel, the emulator."""
    import emulator
    import torch

    from fastattn.runtime import cuda

    torch.cuda._sleep = lambda cycles: None  # a kernel of torch's own, which benchmarks wait with
    launch = cuda.run

    def run(kernel: cuda.Kernel, grid: tuple[int, int, int], values: Sequence[Any], device: torch.device) -> None:
        launch(kernel, grid, values, device)
        if device.type != "cuda" or cuda._recording is not None or 0 in grid:
            return
        asked = cuda.Launch(kernel, grid, tuple(values))

        def execute() -> None:
            with torch.device("cpu"):  # tests make another one the default
                emulator.run(asked)

        recorded = graphs.recorded()
        if recorded is None:
            execute()
        else:
            recorded.append(execute)

    cuda.run = run
