"""NVIDIA's run-time compiler, found where a CUDA build of torch, a wheel, the toolkit or the system has it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.runtime import env

_KNOWN_MAJORS = (13, 12)


class Compiled(NamedTuple):
    """image: a cubin, or PTX where the target is compute_XX; name: the kernel's mangled name in it; log: warnings."""

    image: bytes
    name: str
    log: str


class CompileError(Exception):
    """NVRTC's own words about a program that does not compile."""


class Library(NamedTuple):
    """A loaded NVRTC: where it was found, (major, minor), the architectures that it compiles for, such as 90, and the bytes
    of its file, which tell releases of one version apart (0 where the system found it by name)."""

    handle: Any
    place: str
    version: tuple[int, int]
    archs: tuple[int, ...]
    size: int = 0

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.place})"

    def compile(self, source: str, expression: str, headers: Mapping[str, str], options: Sequence[str]) -> Compiled:
        """The instance `expression` of a template that `source` includes. Raises CompileError."""
        program = ctypes.c_void_p()
        texts, names = _strings(headers.values()), _strings(headers)
        self._call("CreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), texts, names)
        try:
            self._call("AddNameExpression", program, expression.encode())
            status = self.handle.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._get("ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            if status != 0:
                raise CompileError(log or self._words(status))
            lowered = ctypes.c_char_p()
            self._call("GetLoweredName", program, expression.encode(), ctypes.byref(lowered))
            image = self._get("CUBIN", program) or self._get("PTX", program)
            return Compiled(image, (lowered.value or b"").decode(), log)
        finally:
            self.handle.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        if size.value == 0:
            return b""
        content = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, content)
        return content.raw

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.handle, f"nvrtc{name}")(*arguments)
        if status != 0:
            raise RuntimeError(f"jit: nvrtc{name} of {self} failed: {self._words(status)}")

    def _words(self, status: int) -> str:
        return self.handle.nvrtcGetErrorString(status).decode()


def _strings(values: Any) -> Any:
    values = list(values)
    return (ctypes.c_char_p * len(values))(*[v.encode() for v in values])


@functools.cache
def library() -> Library:
    """The first that loads: that of torch's CUDA version before newer ones, whose code the driver may not know.

    Raises OSError with every place that was tried.
    """
    tried = []
    ours = (torch.version.cuda or "").split(".")[0]
    for place in sorted(_places(), key=lambda p: _major(p) != ours):  # stable: otherwise as _places lists them
        try:
            return _load(place)
        except OSError as failure:
            tried.append(f"{place}: {failure}")
    raise OSError(
        "NVRTC, the run-time compiler of CUDA (pip install nvidia-cuda-nvrtc), which was not found"
        + "".join(f"; {words}" for words in tried)
    )


def _major(place: str) -> str:
    found = re.search(r"\.so\.(\d+)", place)
    return found[1] if found else ""


def _places() -> Iterator[str]:
    for folder in _folders():
        yield from sorted((str(p) for p in folder.glob("libnvrtc*.so.*") if _is_compiler(p)), reverse=True)
    yield from (f"libnvrtc.so.{major}" for major in _KNOWN_MAJORS)


def _is_compiler(path: Path) -> bool:
    return not re.search(r"builtins|\.alt\.", path.name)


def _folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():  # cu13/lib, cuda_nvrtc/lib
        yield from sorted(Path(place).glob("*/lib"), reverse=True)
    yield Path(torch.__file__).parent / "lib"
    for toolkit in (env.CUDA_HOME, "/usr/local/cuda"):
        if toolkit:
            yield from (Path(toolkit) / "lib64", *Path(toolkit).glob("targets/*/lib"))


def _load(place: str) -> Library:
    for builtins in Path(place).parent.glob("libnvrtc-builtins*.so*") if "/" in place else ():
        if ".alt." not in builtins.name:
            ctypes.CDLL(str(builtins))  # NVRTC looks for it by name alone
    handle = ctypes.CDLL(place)
    handle.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        handle.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        handle.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        handle.nvrtcGetSupportedArchs(archs)
    except AttributeError as failure:  # older than CUDA 11.2
        raise OSError(str(failure)) from failure
    size = Path(place).stat().st_size if "/" in place else 0
    return Library(handle, place, (major.value, minor.value), tuple(sorted(archs)), size)
