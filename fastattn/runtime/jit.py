"""Compiles one specialisation of a CUDA C++ kernel with NVRTC, which comes with every CUDA build of torch."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

from fastattn.runtime import cuda, sources

OPTIONS = ("-std=c++17", "-default-device", "-lineinfo", "--device-int128", "-diag-suppress=177")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(place).glob("*/lib/libnvrtc.so.*")):
            for builtins in file.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC looks for it by name alone
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(file))
    return ctypes.CDLL("libnvrtc.so.13")


def compile(kernel: cuda.Kernel, arch: str) -> tuple[bytes, str, str]:
    """(cubin, mangled name, log) for arch "sm_80", "sm_90a", …"""
    nvrtc = _nvrtc()
    headers = sources.headers()
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*[t.encode() for t in headers.values()])
    names = (ctypes.c_char_p * len(headers))(*[n.encode() for n in headers])
    source = f"#include <{kernel.file}>\n".encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", len(headers), texts, names)
    nvrtc.nvrtcAddNameExpression(program, str(kernel).encode())
    options = [f"-arch={arch}", *OPTIONS]
    status = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    log = text.value.decode()
    if status != 0:
        raise RuntimeError(f"jit: NVRTC cannot compile {kernel} for {arch}:\n{log}")
    lowered = ctypes.c_char_p()
    nvrtc.nvrtcGetLoweredName(program, str(kernel).encode(), ctypes.byref(lowered))
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    name = (lowered.value or b"").decode()
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, name, log
