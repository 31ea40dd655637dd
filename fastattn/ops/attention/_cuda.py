"""The backend `cuda`: the forward for every GPU from sm_80 on (csrc/cuda/attention_fwd.cuh), unless a newer one has its own.

`backward` is in _cuda_bwd.py, `kvcache` in _cuda_decode.py, the forward of Hopper in _cuda_sm90.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import _cuda_sm90, tuning_cuda, tuning_sm90
from fastattn.ops.attention._cuda_bwd import backward as backward
from fastattn.ops.attention._cuda_decode import kvcache as kvcache
from fastattn.ops.attention._cuda_layout import Layout, forward_numbers, options_layout, row_sizes, rows_aligned
from fastattn.runtime import cuda

Tensor = torch.Tensor
_LAYOUT = ("attention_params.h", "AttentionParams")
_BLOCK, _SIGHTS = 48, 1024  # bytes of shared memory behind the tiles; csrc/cuda/attention_fwd.cuh
_L2 = 24 << 20  # bytes of k and v that blocks running at the same time should share
_MOST_BLOCKS = 65535  # of a grid's second and third dimension


def forward(spec: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Tensor | None) -> None:
    """options: mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox."""
    device = q.device
    layout = Layout(
        (q.stride(), k.stride(), v.stride(), o.stride(), lse.stride()),
        (q.shape[0], k.shape[0]),
        not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
        options_layout(*options),
    )
    if cuda.hopper(device):
        plan = _cuda_sm90.plan(spec, layout, cuda.sms(device), tuning_sm90.tried.rows)
        if plan is not None:
            _cuda_sm90.forward(plan, q, k, v, o, lse, *options)
            return
    kernel, grid, numbers = _plan(spec, layout, cuda.arch(device))
    cuda.run(kernel, grid, (q, k, v, o, lse, *options, *numbers), device)


class _Plan(NamedTuple):
    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    numbers: tuple[Any, ...]  # the fields of AttentionParams behind the tensors


@functools.lru_cache(4096)
def _plan(spec: Any, layout: Layout, arch: int) -> _Plan:
    """strides: of q, k, v, o, lse."""
    rows_q, rows_k = row_sizes(spec, layout)
    q, k, v = layout.strides[:3]
    aligned = layout.aligned and rows_aligned(rows_q, q) and rows_aligned(rows_k, k) and rows_aligned(rows_k, v)
    headdim, headdim_v = tuning_cuda.widths(spec.headdim, spec.headdim_v)
    kind = tuning_cuda.kind(spec)
    tiles_of = "pairs" if kind == "band" and not aligned else kind  # copying by elements needs registers, too
    tile = tuning_cuda.find(arch, headdim, headdim_v, tiles_of).fwd
    heads, together = spec.batch * spec.nheads, _heads_together(spec)
    return _Plan(
        _kernel(spec.dtype, headdim, headdim_v, tile, aligned, kind),
        (together, -(-spec.seqlen_q // tile.BLOCK_M), -(-heads // together) if together else 0),
        forward_numbers(spec, layout),
    )


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
