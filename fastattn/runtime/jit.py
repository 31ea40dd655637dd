"""Compiles one specialisation of a CUDA C++ kernel for one architecture, or takes it from the cache on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from typing import TYPE_CHECKING

from fastattn.runtime import cache, nvrtc, sources
from fastattn.runtime.nvrtc import Compiled

if TYPE_CHECKING:
    from fastattn.runtime import cuda

# -default-device: a function without __host__ or __device__ is a device function. 177: a header's verb that is not used.
OPTIONS = ("-std=c++17", "-default-device", "-lineinfo", "-diag-suppress=177")
_OLDEST = (12, 0)  # the first that knows sm_90a
_one_at_a_time = threading.Lock()


def error() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    try:
        library = nvrtc.library()
    except OSError as failure:
        return str(failure)
    return None if library.version >= _OLDEST else f"NVRTC {_OLDEST[0]}.{_OLDEST[1]} or newer, got {library}"


def target(kernel: cuda.Kernel, arch: int) -> str:
    """What `kernel` is compiled for on a GPU of compute capability `arch` (90): "sm_90a", or "compute_120" (PTX, which the
    driver finishes) when the GPU is newer than NVRTC. Raises RuntimeError when NVRTC cannot serve the GPU."""
    if kernel.hopper and arch != 90:
        raise RuntimeError(f"jit: {kernel} runs on compute capability 9.0 alone, got {arch / 10}")
    library = nvrtc.library()
    if arch in library.archs:
        return "sm_90a" if arch == 90 else f"sm_{arch}"
    older = [a for a in library.archs if a < arch]
    if kernel.hopper or not older:
        raise RuntimeError(f"jit: {library} cannot compile {kernel} for sm_{arch}, it knows {library.archs}")
    return f"compute_{older[-1]}"


def load(kernel: cuda.Kernel, arch: str) -> Compiled:
    """From the cache, else compiled and kept there. arch: as `target` gives it."""
    entry = entry_of(kernel, arch)
    return _cached(entry) or _compile_and_keep(kernel, arch, entry)


def is_cached(kernel: cuda.Kernel, arch: str) -> bool:
    return cache.read(entry_of(kernel, arch)) is not None


def entry_of(kernel: cuda.Kernel, arch: str) -> str:
    """The name in the cache: it differs whenever the code could."""
    library = nvrtc.library()
    facts = [library.version, library.size, _options(arch), str(kernel), digest(kernel.file)]
    return f"{kernel.name}-{arch}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]}"


@functools.cache
def digest(file: str) -> str:
    """Of `file` and every header that it includes."""
    return hashlib.sha256(json.dumps(sources.closure(file), sort_keys=True).encode()).hexdigest()


def _cached(entry: str) -> Compiled | None:
    content = cache.read(entry)
    if content is None:
        return None
    name, _, image = content.partition(b"\n")
    return Compiled(image, name.decode(), "")


def _compile_and_keep(kernel: cuda.Kernel, arch: str, entry: str) -> Compiled:
    with _one_at_a_time:
        if found := _cached(entry):  # another thread was here first
            return found
        built = compile(kernel, arch)
        cache.write(entry, built.name.encode() + b"\n" + built.image)
    return built


def compile(kernel: cuda.Kernel, arch: str) -> Compiled:
    """Compiled now, whatever the cache holds. arch: "sm_80", "sm_90a", "compute_120", …"""
    library = nvrtc.library()
    source = f"#include <{kernel.file}>\n"
    try:
        return library.compile(source, str(kernel), sources.closure(kernel.file), _options(arch))
    except nvrtc.CompileError as failure:
        raise RuntimeError(
            f"jit: {library} cannot compile {kernel} of {sources.folder() / kernel.file} for {arch} with "
            f"{' '.join(OPTIONS)}:\n{failure}"
        ) from None


def _options(arch: str) -> tuple[str, ...]:
    return (f"-arch={arch}", *OPTIONS)
