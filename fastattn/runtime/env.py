"""Every environment variable of fastattn, read once at import. docs/environment.md says what each is for."""

from __future__ import annotations

import os


def _choice(name: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return None
    if value not in allowed:
        raise ValueError(f"fastattn: environment variable {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _text(*names: str) -> str | None:
    """The first of them that is set and not empty."""
    return next((value for value in map(os.environ.get, names) if value), None)


ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")

BACKEND = _choice("FASTATTN_BACKEND", ("cuda", "triton", "cpu", "reference"))
CPU_ISA = _choice("FASTATTN_CPU_ISA", ISAS)
HUGEPAGES = _choice("FASTATTN_HUGEPAGES", ("0", "1")) != "0"
CUDA_CACHE = _text("FASTATTN_CUDA_CACHE")  # a folder, or "off"
CUDA_HOME = _text("CUDA_HOME", "CUDA_PATH")  # of the CUDA toolkit, as torch reads it too
CACHE_HOME = _text("XDG_CACHE_HOME")
