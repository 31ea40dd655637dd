"""Compiles the emulator's runtime, and kernels with it, into libraries in a folder of the user's; each once per content."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from fastattn.runtime import cuda, sources

HERE = Path(__file__).resolve().parent
COMPILER = "g++"
# Options of both: FMA and conversions of the machine at hand; NVRTC fuses multiplications with additions too.
_COMMON = ("-std=c++17", "-march=native", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing")
_RUNTIME = (*_COMMON, "-O2", "-Wall", "-Wextra", "-r", "-nostdlib")
_KERNEL = (
    *_COMMON,
    "-O1",
    "-g1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-stack-protector",
    "-fno-thread-jumps",
    "-ftrivial-auto-var-init=pattern",
    "-Wno-unknown-pragmas",
    "-Werror=frame-larger-than=49152",  # a fibre's stack has 64 KiB
)
# template <class T, int N> __global__ void __launch_bounds__(2 * N, 1) name(
_BOUNDS = r"(template\s*<[^{{}};]*?>\s*)?__global__\s+void\s+__launch_bounds__\(([^{{}};]*?)\)\s*{name}\s*\("
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def available() -> bool:
    """Whether this machine has the compiler that the emulator needs."""
    return sys.platform == "linux" and shutil.which(COMPILER) is not None


@functools.cache
def _machine() -> str:
    """Compiler and instruction set: what a library's code depends on besides the sources."""
    questions = (("--version",), ("-march=native", "-Q", "--help=target"))
    return "".join(subprocess.run([COMPILER, *q], capture_output=True, text=True).stdout for q in questions)


@functools.cache
def cache() -> Path:
    """The folder of compiled libraries, this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"fastattn-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise RuntimeError(f"{folder} belongs to someone else or is writable by others")
    return folder


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator cannot compile this:\n{done.stderr}\n{' '.join(command)}")


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` at once, whoever else makes the same."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _key(*texts: str) -> str:
    return hashlib.sha256("\0".join((_machine(), *texts)).encode()).hexdigest()[:24]


@functools.cache
def runtime() -> Path:
    """The runtime as one object file."""
    files = [*sorted(HERE.glob("runtime/*")), HERE / "device.h"]
    path = cache() / f"runtime-{_key(*_RUNTIME, *(f.read_text() for f in files))}.o"
    if not path.exists():
        with _placed(path) as out:
            _compile([COMPILER, *_RUNTIME, f"-I{HERE}", "-o", str(out), *(str(f) for f in files if f.suffix == ".cpp")])
    return path


def _sources(name: str, folders: tuple[Path, ...], seen: dict[str, str]) -> dict[str, str]:
    """The texts of a header and of what it includes, by path."""
    for folder in folders:
        path = folder / name
        if path.is_file():
            if str(path) not in seen:
                seen[str(path)] = path.read_text()
                for included in _INCLUDE.findall(seen[str(path)]):
                    _sources(included, (path.parent, *folders), seen)
            return seen
    return seen


def library(kernel: cuda.Kernel, folder: Path | None = None) -> Path:
    """The compiled specialisation, linked with the runtime; its file lies in `folder` if given, else in csrc/cuda."""
    compiled = _object(kernel, folder)
    path = cache() / f"{kernel.name}-{_key(compiled.name, runtime().name)}.so"
    if not path.exists():
        with _placed(path) as out:
            _compile([COMPILER, "-shared", "-Wl,-Bsymbolic", "-o", str(out), str(compiled), str(runtime()), "-lm"])
    return path


def _object(kernel: cuda.Kernel, folder: Path | None) -> Path:
    folders = (HERE, sources.folder()) if folder is None else (HERE, folder, sources.folder())
    called = str(kernel) if kernel.constants else kernel.name
    program = f"#include <{kernel.file}>\n#include <entry.h>\nEMULATOR_KERNEL({called})\n"
    program += _bounds(kernel, folders)
    arch = f"-D__CUDA_ARCH__={900 if kernel.hopper else 10 * cuda.EMULATED_ARCH}"
    texts: dict[str, str] = {}
    for name in (kernel.file, "cuda.h", "entry.h"):
        _sources(name, folders, texts)
    path = cache() / f"{kernel.name}-{_key(*_KERNEL, arch, program, *texts.values())}.o"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch, _placed(path) as out:
            source = Path(scratch) / f"{kernel.name}.cpp"
            source.write_text(program)
            includes = [f"-I{f}" for f in folders]
            _compile([COMPILER, *_KERNEL, arch, "-include", "cuda.h", *includes, "-c", "-o", str(out), str(source)])
    return path


def _bounds(kernel: cuda.Kernel, folders: tuple[Path, ...]) -> str:
    """C++ that evaluates the kernel's __launch_bounds__ for this specialisation."""
    text = next((f / kernel.file).read_text() for f in folders if (f / kernel.file).is_file())
    found = re.search(_BOUNDS.format(name=kernel.name), text)
    if found is None:
        raise RuntimeError(f"{kernel.file} must declare {kernel.name} with __launch_bounds__: registers follow from it")
    constants = f"<{', '.join(kernel.constants)}>" if kernel.constants else ""
    declared = f"{found[1] or ''}constexpr emulator::Bounds emulator_bounds_of = {{{found[2]}}};\n"
    return f"{declared}EMULATOR_BOUNDS(emulator_bounds_of{constants})\n"


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@functools.cache
def places(path: Path, pc: int) -> tuple[str, ...]:
    """Where in the source the call before `pc` stands, "function at file:line" from the inside out."""
    done = subprocess.run(["addr2line", "-Cfie", str(path), hex(pc - 1)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found = [
        f"{_short(at)} ({function.partition('(')[0].split()[-1]})"
        for function, at in zip(lines[::2], lines[1::2], strict=True)
    ]
    return tuple(p for p in found if not p.startswith(("cuda.h", "device.h", "entry.h", "ptx/")))


def _short(place: str) -> str:
    """file:line with the file as it is included."""
    file, _, line = place.partition(" ")[0].rpartition(":")
    for root in (HERE, sources.folder()):
        with contextlib.suppress(ValueError):
            file = str(Path(file).resolve().relative_to(root.resolve()))
    return f"{file}:{line}"
