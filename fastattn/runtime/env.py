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


ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")

BACKEND = _choice("FASTATTN_BACKEND", ("cuda", "triton", "cpu", "reference"))
CPU_ISA = _choice("FASTATTN_CPU_ISA", ISAS)
HUGEPAGES = _choice("FASTATTN_HUGEPAGES", ("0", "1")) != "0"
