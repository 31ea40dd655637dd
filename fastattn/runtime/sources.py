"""Where the CUDA C++ sources lie: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

import functools
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "_csrc" / "cuda", _PACKAGE.parent / "csrc" / "cuda")
_INCLUDE = re.compile(r"^\s*#\s*include\s*<([^>]+)>", re.MULTILINE)


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
def closure(name: str) -> dict[str, str]:
    """`name` and every header that it includes, by the names they are included as."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found[one] = read(one)
            waiting += _INCLUDE.findall(found[one])
    return found
