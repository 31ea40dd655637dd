"""Where the CUDA C++ sources lie: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

import functools
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "_csrc" / "cuda", _PACKAGE.parent / "csrc" / "cuda")


@functools.cache
def folder() -> Path:
    """The folder of csrc/cuda. Raises RuntimeError when the installation lacks it."""
    for place in _PLACES:
        if (place / "ptx" / "core.cuh").is_file():
            return place
    raise RuntimeError(f"fastattn: the CUDA C++ sources are missing; looked in {_PLACES[0]} and {_PLACES[1]}")


@functools.cache
def read(name: str) -> str:
    """The text of one file, by its path below csrc/cuda."""
    return (folder() / name).read_text()


@functools.cache
def headers() -> dict[str, str]:
    """Every header, by the name it is included as."""
    found = sorted(p for p in folder().rglob("*") if p.suffix in (".cuh", ".h"))
    return {str(p.relative_to(folder())): p.read_text() for p in found}
