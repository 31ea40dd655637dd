"""Who computes attention, best first. The reference takes every valid call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.ops._dispatch import Backend
from fastattn.ops.attention.kvcache_spec import KVCacheSpec
from fastattn.runtime import aot, launch, native

_LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE_MISSING = native.error()
_NONE: tuple[str, ...] = ()
_WIDEST, _WIDEST_V = 576, 512
_WIDEST_SMALL, _SHARED_OF_WIDE = 256, 163 << 10  # the tiles of wider heads do not fit smaller shared memory


def _cpu_objections(spec: Any) -> Sequence[str]:
    if spec.device == "cpu" and spec.dtype in _LOW_DTYPES and _NATIVE_MISSING is None:
        return _NONE
    reasons = [] if _NATIVE_MISSING is None else [_NATIVE_MISSING]
    if spec.device != "cpu":
        reasons.append(f"device cpu, got {spec.device}")
    if spec.dtype not in _LOW_DTYPES:
        reasons.append(f"dtype float32, bfloat16 or float16, got {spec.dtype}")
    return reasons


def _triton_objections(spec: Any) -> Sequence[str]:
    reasons = launch.objections(spec.device)
    if spec.dtype not in _LOW_DTYPES:
        reasons.append(f"dtype float32, bfloat16 or float16, got {spec.dtype}")
    if spec.headdim > _WIDEST or spec.headdim_v > _WIDEST_V:
        reasons.append(f"headdim up to {_WIDEST} and headdim_v up to {_WIDEST_V}, got {spec.headdim}, {spec.headdim_v}")
    elif spec.headdim > _WIDEST_SMALL and not reasons:
        limit = aot.shared_limit(launch.arch(torch.device(spec.device)))
        if limit < _SHARED_OF_WIDE and not launch.INTERPRETED:
            reasons.append(
                f"headdim up to {_WIDEST_SMALL} on a GPU with {limit >> 10} KB of shared memory, got {spec.headdim}"
            )
    return reasons


def _triton_row(spec: Any) -> object:
    from fastattn.ops.attention import _triton_decode, tuning

    return _triton_decode.row_of(spec) if isinstance(spec, KVCacheSpec) else tuning.row_of(spec)


BACKENDS = (
    Backend("cpu", "fastattn.ops.attention._cpu", _cpu_objections),
    Backend("triton", "fastattn.ops.attention._triton", _triton_objections, _triton_row),
    Backend("reference", "fastattn.ops.attention._reference", lambda spec: _NONE),
)
