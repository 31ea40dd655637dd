"""Who computes attention, best first. The reference takes every valid call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.ops._dispatch import Backend
from fastattn.runtime import native

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE_MISSING = native.error()
_NONE: tuple[str, ...] = ()


def _cpu_objections(spec: Any) -> Sequence[str]:
    if spec.device == "cpu" and spec.dtype in _CPU_DTYPES and _NATIVE_MISSING is None:
        return _NONE
    reasons = [] if _NATIVE_MISSING is None else [_NATIVE_MISSING]
    if spec.device != "cpu":
        reasons.append(f"device cpu, got {spec.device}")
    if spec.dtype not in _CPU_DTYPES:
        reasons.append(f"dtype float32, bfloat16 or float16, got {spec.dtype}")
    return reasons


BACKENDS = (
    Backend("cpu", "fastattn.ops.attention._cpu", _cpu_objections),
    Backend("reference", "fastattn.ops.attention._reference", lambda spec: _NONE),
)
