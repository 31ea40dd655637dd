"""The backend `cuda`: the forward for every GPU from sm_80 on (csrc/cuda/attention_fwd.cuh), unless a newer one has its own.

`backward` is in _cuda_bwd.py, `kvcache` in _cuda_decode.py, the forward of Hopper in _cuda_sm90.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import _cuda_sm90, tuning_cuda
from fastattn.ops.attention._arguments import (
    dropout,
    edges,
    is_float,
    pair_strides,
    rows_aligned,
    slopes_stride,
    strides,
)
from fastattn.ops.attention._cuda_bwd import backward as backward
from fastattn.ops.attention._cuda_decode import kvcache as kvcache
from fastattn.runtime import cuda

Tensor = torch.Tensor
_LAYOUT = ("attention_params.h", "AttentionParams")
_BLOCK, _SIGHTS = 48, 1024  # bytes of shared memory behind the tiles; csrc/cuda/attention_fwd.cuh
_L2 = 24 << 20  # bytes of k and v that blocks running at the same time should share
_MOST_BLOCKS = 65535  # of a grid's second and third dimension


def _kernel(dtype: torch.dtype, headdim: int, headdim_v: int, tile: tuning_cuda.Tile, aligned: bool, kind: str) -> Any:
    rows, keys, warps, stages, q_in_registers = tile
    q, kv, o = 2 * rows * headdim, 2 * stages * keys * (headdim + headdim_v), 2 * rows * headdim_v
    shared = max(q, kv if q_in_registers else q + kv, o) + _BLOCK + (0 if kind == "band" else _SIGHTS)
    flags = (q_in_registers, aligned, kind != "band", kind == "dropout")
    constants = (cuda.TYPES[dtype], rows, keys, headdim, headdim_v, warps, stages, *(str(f).lower() for f in flags))
    return cuda.kernel(
        "attention_fwd.cuh", "attention_fwd_kernel", tuple(map(str, constants)), _LAYOUT, 32 * warps, shared
    )


def _heads_together(spec: Any) -> int:
    """How many heads take turns block by block, so that a causal call's longest blocks come first without its keys and
    values leaving the L2 cache."""
    group, heads = spec.nheads // spec.nheads_k, spec.nheads * spec.batch
    fitting = 1
    if spec.right is not None:
        fitting = max(1, _L2 // max(1, 2 * spec.seqlen_k * (spec.headdim + spec.headdim_v)))
    return min(max(group * fitting, -(-heads // _MOST_BLOCKS)), heads)


class _Plan(NamedTuple):
    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    scores: tuple[float, ...]


@functools.lru_cache(4096)
def _plan(spec: Any, arch: int, aligned: bool) -> _Plan:
    """All that follows from the call without its tensors, in the order of AttentionParams."""
    headdim, headdim_v = tuning_cuda.widths(spec.headdim, spec.headdim_v)
    kind = tuning_cuda.kind(spec)
    tiles_of = "pairs" if kind == "band" and not aligned else kind  # copying by elements needs registers, too
    row = tuning_cuda.find(arch, headdim, headdim_v, tiles_of)
    heads, together = spec.batch * spec.nheads, _heads_together(spec)
    return _Plan(
        _kernel(spec.dtype, headdim, headdim_v, row.fwd, aligned, kind),
        (together, -(-spec.seqlen_q // row.fwd.BLOCK_M), -(-heads // together) if together else 0),
        (
            spec.batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.seqlen_q, spec.seqlen_k,
            *edges(spec), int(spec.upper_left),
        ),
        (float(spec.scale), float(spec.softcap or 0.0), *dropout(spec)),
    )  # fmt: skip


def forward(
    spec: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
) -> None:
    if cuda.hopper(q.device) and _cuda_sm90.takes(spec, q, k, v):
        _cuda_sm90.forward(spec, q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox)
        return
    plan = _plan(spec, cuda.arch(q.device), rows_aligned(q) and rows_aligned(k) and rows_aligned(v))
    values = (
        q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox,
        *strides(q), *strides(k), *strides(v), *strides(o),
        0 if spec.packed else lse.stride(0), lse.stride(-2),
        *pair_strides(mask), *pair_strides(bias), slopes_stride(alibi_slopes), *plan.sizes, is_float(bias), is_float(sinks),
        *plan.scores,
    )  # fmt: skip
    cuda.run(plan.kernel, plan.grid, values, q.device)
