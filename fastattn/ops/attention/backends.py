"""Who computes attention, best first. The reference takes every valid call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.ops._dispatch import Backend
from fastattn.ops.attention.kvcache_spec import KVCacheSpec
from fastattn.runtime import aot, cuda, launch, native

_LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE_MISSING = native.error()
_NONE: tuple[str, ...] = ()
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST, _WIDEST_V = 576, 512
_WIDEST_CUDA = 256
_LONGEST, _MOST_QUERIES = 1 << 30, 65535 * 64  # positions are 32-bit numbers; a grid has 65535 blocks of queries
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


def _triton_weights_objections(spec: Any) -> Sequence[str]:
    """attention_weights reads no v: its spec has headdim in that place."""
    return _triton_objections(spec._replace(headdim_v=min(spec.headdim_v, _WIDEST_V)))


def _cuda_objections(spec: Any) -> Sequence[str]:
    reasons = cuda.objections(spec.device)
    if spec.dtype not in _HALF_DTYPES:
        reasons.append(f"dtype bfloat16 or float16, got {spec.dtype}")
    for name, size in (("headdim", spec.headdim), ("headdim_v", spec.headdim_v)):
        if size > _WIDEST_CUDA or size % 8 != 0:
            reasons.append(f"{name} a multiple of 8 up to {_WIDEST_CUDA}, got {size}")
    if spec.seqlen_q + spec.seqlen_k >= _LONGEST:
        reasons.append(f"fewer than {_LONGEST} keys and queries together, got {spec.seqlen_q + spec.seqlen_k}")
    if spec.seqlen_q > _MOST_QUERIES and not isinstance(spec, KVCacheSpec):
        reasons.append(f"up to {_MOST_QUERIES} queries, got {spec.seqlen_q}")
    return reasons


def _cuda_row(spec: Any) -> object:
    from fastattn.ops.attention import _cuda_decode, _cuda_sm90, tuning_cuda, tuning_sm90

    if isinstance(spec, KVCacheSpec):
        return _cuda_decode.row_of(spec)
    hopper = cuda.hopper(torch.device(spec.device)) and not _cuda_sm90.objections(spec)
    return tuning_sm90.row_of(spec) if hopper else tuning_cuda.row_of(spec)


def _triton_row(spec: Any) -> object:
    from fastattn.ops.attention import tuning, tuning_decode

    return tuning_decode.row_of(spec) if isinstance(spec, KVCacheSpec) else tuning.row_of(spec)


_CPU = Backend("cpu", "fastattn.ops.attention._cpu", _cpu_objections)
_CUDA = Backend("cuda", "fastattn.ops.attention._cuda", _cuda_objections, _cuda_row)
_TRITON = Backend("triton", "fastattn.ops.attention._triton", _triton_objections, _triton_row)
_TRITON_WEIGHTS = Backend("triton", "fastattn.ops.attention._triton", _triton_weights_objections, _triton_row)
_REFERENCE = Backend("reference", "fastattn.ops.attention._reference", lambda spec: _NONE)
BACKENDS = (_CPU, _CUDA, _TRITON, _REFERENCE)
WEIGHTS = (_CPU, _TRITON_WEIGHTS, _REFERENCE)  # bound by writing the result: there is no CUDA C++ kernel
