"""Writes new keys and values into a cache in Triton; with RoPE it rotates the keys, and the queries, on the way."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.ops.rope._triton import rotate_heads as rotate_heads
from fastattn.runtime import launch

Tensor = torch.Tensor
_ELEMENTS = 4096  # per program, by analysis: 4 warps with 16-byte accesses, four times in 16-bit dtypes


@triton.jit
def _copy_heads(
    x_ptr, y_ptr, x_rows, y_rows, x_head, y_head, here, first, nheads, headdim,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of BLOCK_M rows, which start x_rows and y_rows in."""
    h = first + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    live = here[:, None, None] & (h < nheads)[None, :, None] & (d < headdim)
    x = tl.load(x_ptr + (x_rows[:, None, None] + h.to(tl.int64)[None, :, None] * x_head) + d, mask=live)
    tl.store(y_ptr + (y_rows[:, None, None] + h.to(tl.int64)[None, :, None] * y_head) + d, x, mask=live)


@triton.jit(
    do_not_specialize=["rows", "seqlen_new", "nheads", "nheads_k", "capacity", "table_rows", "groups_k", "groups_v"]
)
def kvcache_append_kernel(
    k_ptr, v_ptr, q_ptr, k_cache_ptr, v_cache_ptr, q_out_ptr, seqlens_ptr, table_ptr, cos_ptr, sin_ptr,
    rows, seqlen_new, nheads, nheads_k, capacity, table_rows, groups_k, groups_v,
    k_b, k_m, k_h, v_b, v_m, v_h, q_b, q_m, q_h, kc_b, kc_n, kc_h, vc_b, vc_n, vc_h, qo_b, qo_m, qo_h,
    table_b, cos_row, sin_row,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_H_V: tl.constexpr, BLOCK_H_Q: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_HALF: tl.constexpr,
):  # fmt: skip
    """A group of heads of k, of v or of q at BLOCK_M new positions: k and v go to slots seqlens[b] + i, q to q_out.

    Grid: (cdiv(batch · seqlen_new, BLOCK_M), groups of k's, of v's and of q's heads). Registers only. Bound by memory:
    every element is read and written once. Slots beyond the capacity are not written; a position outside of the tables
    gives NaN. Without RoPE cos_ptr is None and there are no groups of q.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    here = row < rows
    b = (row // seqlen_new).to(tl.int64)
    i = row % seqlen_new
    n = tl.load(seqlens_ptr + b, mask=here, other=0) + i
    fits = here & (n >= 0) & (n < capacity)
    i = i.to(tl.int64)
    block, slot = b, n.to(tl.int64)
    if table_ptr is not None:
        block = tl.load(table_ptr + b * table_b + n // BLOCK_SIZE, mask=fits, other=0).to(tl.int64)
        slot = (n % BLOCK_SIZE).to(tl.int64)
    v_group = group - groups_k
    q_group = v_group - groups_v
    if (v_group >= 0) & (q_group < 0):
        _copy_heads(
            v_ptr, v_cache_ptr, b * v_b + i * v_m, block * vc_b + slot * vc_n, v_h, vc_h, fits, v_group * BLOCK_H_V,
            nheads_k, HEADDIM_V, BLOCK_M, BLOCK_H_V, DV,
        )  # fmt: skip
        return
    if cos_ptr is None:
        _copy_heads(
            k_ptr, k_cache_ptr, b * k_b + i * k_m, block * kc_b + slot * kc_n, k_h, kc_h, fits, group * BLOCK_H,
            nheads_k, HEADDIM, BLOCK_M, BLOCK_H, D,
        )  # fmt: skip
    else:
        d = tl.arange(0, D_HALF)[None, :]
        known = (here & (n >= 0) & (n < table_rows))[:, None] & (d < HALF)
        position = n.to(tl.int64)[:, None]
        c = tl.load(cos_ptr + position * cos_row + d, mask=known, other=float("nan")).to(tl.float32)[:, None, :]
        s = tl.load(sin_ptr + position * sin_row + d, mask=known, other=float("nan")).to(tl.float32)[:, None, :]
        if q_group >= 0:
            rotate_heads(
                q_ptr, q_out_ptr, b * q_b + i * q_m, b * qo_b + i * qo_m, q_h, qo_h, here, q_group * BLOCK_H_Q, nheads,
                HEADDIM, c, s, HALF, INTERLEAVED, TAIL, BLOCK_M, BLOCK_H_Q, D_HALF,
            )  # fmt: skip
        else:
            rotate_heads(
                k_ptr, k_cache_ptr, b * k_b + i * k_m, block * kc_b + slot * kc_n, k_h, kc_h, fits, group * BLOCK_H,
                nheads_k, HEADDIM, c, s, HALF, INTERLEAVED, TAIL, BLOCK_M, BLOCK_H, D_HALF,
            )  # fmt: skip


def append(
    spec: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, k: Tensor, v: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write k and v into the caches; q, rotated when there are cos and sin."""
    rows = spec.batch * spec.seqlen_new
    plan = _plan(
        rows, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.rotary_dim, spec.block_size,
        spec.interleaved, launch.sms(q.device),
    )  # fmt: skip
    grid, groups_k, groups_v, constants = plan
    rotated = None if cos is None else q.new_empty(q.shape)
    launch.run(
        kvcache_append_kernel,
        grid,
        (k, v, None if cos is None else q, k_cache, v_cache, rotated, cache_seqlens, block_table, cos, sin),
        (
            rows, spec.seqlen_new, spec.nheads, spec.nheads_k, spec.seqlen_k, 0 if cos is None else cos.shape[0],
            groups_k, groups_v, *k.stride()[:3], *v.stride()[:3], *q.stride()[:3], *k_cache.stride()[:3],
            *v_cache.stride()[:3], *(q if rotated is None else rotated).stride()[:3],
            None if block_table is None else block_table.stride(0), None if cos is None else cos.stride(0),
            None if sin is None else sin.stride(0),
        ),
        constants,
    )  # fmt: skip
    return q if rotated is None else rotated


@functools.lru_cache(4096)
def _plan(
    rows: int, nheads: int, nheads_k: int, headdim: int, headdim_v: int, rotary_dim: int | None,
    block_size: int | None, interleaved: bool, sms: int,
) -> tuple[tuple[int, int], int, int, dict[str, Any]]:  # fmt: skip
    """The grid, the groups of k's and of v's heads, and the constants."""
    d, dv = launch.next_power_of_2(headdim), launch.next_power_of_2(headdim_v)
    half = (rotary_dim or 0) // 2
    share, share_v, share_q = _share(nheads_k, d), _share(nheads_k, dv), _share(nheads, d) if half else 1
    block = max(1, _ELEMENTS // max(share * d, share_v * dv, share_q * d))
    while block > 1 and rows < 2 * block * sms:
        block //= 2
    groups_k, groups_v = launch.cdiv(nheads_k, share), launch.cdiv(nheads_k, share_v)
    groups_q = launch.cdiv(nheads, share_q) if half else 0
    constants = {
        "HEADDIM": headdim, "HEADDIM_V": headdim_v, "HALF": half, "BLOCK_SIZE": block_size or 1,
        "INTERLEAVED": interleaved, "TAIL": launch.next_power_of_2(headdim - 2 * half) if headdim > 2 * half > 0 else 0,
        "BLOCK_M": block, "BLOCK_H": share, "BLOCK_H_V": share_v, "BLOCK_H_Q": share_q, "D": d, "DV": dv,
        "D_HALF": launch.next_power_of_2(max(half, 1)),
    }  # fmt: skip
    return (launch.cdiv(rows, block), groups_k + groups_v + groups_q), groups_k, groups_v, constants


def _share(nheads: int, width: int) -> int:
    """Heads per program."""
    return max(1, min(launch.next_power_of_2(nheads), _ELEMENTS // width))
