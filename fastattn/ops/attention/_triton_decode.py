"""attention_kvcache in Triton: append to the cache, attend to it in splits of the keys, combine the splits."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.ops.attention._arguments import SMALLEST_SCALE
from fastattn.ops.attention._triton_append import append
from fastattn.ops.attention._triton_score import LN2, LOG2E, any_lost, band, dot, dot_seen, score
from fastattn.ops.attention.tuning import FEWEST_KEYS, split, splits
from fastattn.ops.attention.tuning_decode import DecodeRow, row_of
from fastattn.runtime import launch

Tensor = torch.Tensor
_LOST_M, _LOST_N = tl.constexpr(16), tl.constexpr(16)  # tiles of the slow road for numbers that are not finite


@triton.jit
def _load_columns(ptr, rows, live, D: tl.constexpr, FIRST: tl.constexpr, HEADDIM: tl.constexpr):
    """Columns [FIRST, FIRST + D) of the rows that start `rows` elements in; 0 beyond HEADDIM and where not live."""
    d = FIRST + tl.arange(0, D)
    inside = live[:, None]
    if FIRST + D > HEADDIM:
        inside = inside & (d < HEADDIM)[None, :]
    return tl.load(ptr + rows[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def _store_columns(ptr, rows, live, x, D: tl.constexpr, FIRST: tl.constexpr, HEADDIM: tl.constexpr):
    d = FIRST + tl.arange(0, D)
    inside = live[:, None]
    if FIRST + D > HEADDIM:
        inside = inside & (d < HEADDIM)[None, :]
    tl.store(ptr + rows[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _blocks_of(table_ptr, n0, hi, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The cache blocks of keys [n0, n0 + BLOCK_N): one number where they share one, else one per key."""
    if table_ptr is None:
        return n0 * 0
    elif BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + n0 // BLOCK_SIZE, mask=n0 < hi, other=0)
    else:
        n = n0 + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + n // BLOCK_SIZE, mask=n < hi, other=0)


@triton.jit
def _slots(table_ptr, blocks, n, stride_b, stride_n, BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the rows of keys n start, a multiple of ALIGN elements."""
    if table_ptr is None:
        return tl.multiple_of(n.to(tl.int64) * stride_n, ALIGN)
    else:
        rows = blocks.to(tl.int64) * stride_b + (n % BLOCK_SIZE).to(tl.int64) * stride_n
        return tl.multiple_of(rows, ALIGN)


@triton.jit
def _tile(
    acc, acc2, top, total, q_tile, q2_tile, k_ptr, v_ptr, k_rows, v_rows, m, n, live, diagonal, left, right, slope,
    seqlen_q, hi, scale, softcap, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr,
    SHARED: tl.constexpr, TF32: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
    SAFE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys n [BLOCK_N], of which those not live are not touched."""
    k_tile = _load_columns(k_ptr, k_rows, live, D, 0, HEADDIM)
    s = dot(q_tile, tl.trans(k_tile), tl.zeros((q_tile.shape[0], k_tile.shape[0]), tl.float32), TF32)
    if D2 > 0:
        k2_tile = _load_columns(k_ptr, k_rows, live, D2, D, HEADDIM)
        s = dot(q2_tile, tl.trans(k2_tile), s, TF32)
    distance = None
    if slope is not None:
        distance = tl.abs((m[:, None] + diagonal - n[None, :]).to(tl.float32))
    s, _ = score(s, distance, slope, None, scale, softcap, FOLD, q_tile.dtype == tl.float32)
    visible = band(m[:, None], n[None, :], diagonal, left, right, seqlen_q, hi)
    s = tl.where(visible, s, float("-inf"))
    factor = scale * LOG2E if FOLD else 1.0
    raised = tl.maximum(top, tl.max(s, axis=1) * factor)
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    p = tl.exp2(s * factor - shift[:, None])  # [BLOCK_M, BLOCK_N]
    kept_share = tl.exp2(top - shift)
    total = total * kept_share + tl.sum(p, axis=1)
    p = p.to(v_ptr.dtype.element_ty)
    acc = acc * kept_share[:, None]
    if SHARED:
        v_tile = k_tile
    else:
        v_tile = _load_columns(v_ptr, v_rows, live, DV, 0, HEADDIM_V)
    if SAFE:
        acc = dot_seen(p, v_tile, acc, visible, TF32)
    else:
        acc = dot(p, v_tile, acc, TF32)
    if DV2 > 0:
        acc2 = acc2 * kept_share[:, None]
        v2_tile = _load_columns(v_ptr, v_rows, live, DV2, DV, HEADDIM_V)
        if SAFE:
            acc2 = dot_seen(p, v2_tile, acc2, visible, TF32)
        else:
            acc2 = dot(p, v2_tile, acc2, TF32)
    return acc, acc2, raised, total


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, slopes_ptr, sinks_ptr, q_m, q_h, k_b, k_n, v_b, v_n, row0, seqlen_q, split, first,
    last, lo, hi, diagonal, left, right, scale, softcap,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr, FOLD: tl.constexpr,
    SHARED: tl.constexpr, ALIGN: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Rows [row0, row0 + BLOCK_M) against the tiles of keys [first, last): acc, acc2, top (in units of log 2), total.

    Row r is query r // GROUP of head r % GROUP of the group. Of a tile only keys [lo, hi) exist. A sink is a key without
    a value and belongs to split 0.
    """
    r = row0 + tl.arange(0, BLOCK_M)
    m = r // GROUP
    h = r % GROUP
    asked = m < seqlen_q
    q_rows = m.to(tl.int64) * q_m + h.to(tl.int64) * q_h
    q_tile = _load_columns(q_ptr, q_rows, asked, D, 0, HEADDIM)
    q2_tile = q_tile
    if D2 > 0:
        q2_tile = _load_columns(q_ptr, q_rows, asked, D2, D, HEADDIM)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + h)[:, None]
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    acc2 = tl.zeros((BLOCK_M, DV2 if DV2 > 0 else 1), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        top = tl.where(split == 0, sink, top)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    blocks = _blocks_of(table_ptr, first, hi, BLOCK_SIZE, BLOCK_N)
    for n0 in tl.range(first, last, BLOCK_N, num_stages=1 if SAFE else None):
        n = n0 + tl.arange(0, BLOCK_N)
        live = n < hi
        if left is not None:
            live = live & (n >= lo)
        k_rows = _slots(table_ptr, blocks, n, k_b, k_n, BLOCK_SIZE, ALIGN)
        v_rows = _slots(table_ptr, blocks, n, v_b, v_n, BLOCK_SIZE, ALIGN)
        blocks = _blocks_of(table_ptr, n0 + BLOCK_N, hi, BLOCK_SIZE, BLOCK_N)  # ahead, so that no tile waits for it
        acc, acc2, top, total = _tile(
            acc, acc2, top, total, q_tile, q2_tile, k_ptr, v_ptr, k_rows, v_rows, m, n, live, diagonal, left, right,
            slope, seqlen_q, hi, scale, softcap, HEADDIM, HEADDIM_V, FOLD, SHARED, TF32, D, D2, DV, DV2, SAFE,
        )  # fmt: skip
    return acc, acc2, top, total


@triton.jit
def _finish(
    acc, acc2, top, total, o_ptr, lse_ptr, part_ptr, row0, seqlen_q, nheads, part_row, part_lse,
    GROUP: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """Normalise and store the result, or that of a split; a row without keys is o = 0, lse = -inf.

    o_ptr and lse_ptr stand at the sequence's first query and the group's first head; part_row is their place among the
    rows of the partial results.
    """
    r = row0 + tl.arange(0, BLOCK_M)
    m = r // GROUP
    h = r % GROUP
    asked = m < seqlen_q
    row = m.to(tl.int64) * nheads + h
    empty = total == 0.0
    share = (1.0 / tl.where(empty, 1.0, total))[:, None]
    log = tl.log2(tl.where(empty, 1.0, total))
    lse = tl.where(empty, float("-inf"), top + log)
    if part_ptr is None:
        tl.store(lse_ptr + h.to(tl.int64) * seqlen_q + m, lse * LN2, mask=asked)
        out_ptr = o_ptr
    else:
        row += part_row
        tl.store(part_ptr + part_lse + row, lse, mask=asked)
        out_ptr = part_ptr
    _store_columns(out_ptr, row * HEADDIM_V, asked, acc * share, DV, 0, HEADDIM_V)
    if DV2 > 0:
        _store_columns(out_ptr, row * HEADDIM_V, asked, acc2 * share, DV2, DV, HEADDIM_V)


@triton.jit
def _share_of(split, tiles, num_splits, least):
    """The tiles [begin, end) of one split: as even as can be, over no more splits than have `least` tiles each."""
    used = tl.minimum(num_splits, tl.maximum(tiles // least, 1))
    each = tiles // used
    more = tiles % used
    begin = tl.minimum(split, used) * each + tl.minimum(split, more)
    return begin, begin + tl.where(split < used, each + (split < more).to(tl.int32), 0)


@triton.jit(
    do_not_specialize=[
        "seqlen_q", "seqlen_new", "capacity", "blocks_m", "num_splits", "least", "part_rows", "part_lse", "left", "right"
    ]
)  # fmt: skip
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, seqlens_ptr, table_ptr, slopes_ptr, sinks_ptr, o_ptr, lse_ptr, part_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, table_b, slopes_b,
    nheads_k, seqlen_q, seqlen_new, capacity, blocks_m, num_splits, least, part_rows, part_lse, left, right, scale,
    softcap,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr, SEVERAL: tl.constexpr, SHARED: tl.constexpr, ALIGN: tl.constexpr,
    TF32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_M rows (queries times the heads of one group) over one split of the keys they see.

    Grid: blocks_m · nheads_k · num_splits · batch; programs that share keys are neighbours. What a split holds depends
    on the length of its own sequence, read here, so nothing depends on the rest of the batch. Registers: acc
    [BLOCK_M, DV + DV2] and s [BLOCK_M, BLOCK_N] in float32; shared memory: num_stages tiles of k and v. Bound by memory:
    each block of rows reads k and v once. Without part_ptr there is one split and o, lse are the result; with it,
    [num_splits, batch, seqlen_q, nheads] rows of o, then as many of lse in units of log 2, go there.
    SEVERAL: there is more than one query, so that keys can be visible to some rows only. SHARED: v is the first columns
    of k. ALIGN: the strides of k and v are multiples of it.
    Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention, arXiv:2309.06180.
    """
    pid = tl.program_id(0)
    block = pid % blocks_m
    if right is not None:
        block = blocks_m - 1 - block
    h_k = pid // blocks_m % nheads_k
    split = pid // blocks_m // nheads_k % num_splits
    b = pid // blocks_m // nheads_k // num_splits
    seqlen_k = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0) + seqlen_new, capacity)
    diagonal = 0 if UPPER_LEFT else seqlen_k - seqlen_q
    row0 = block * BLOCK_M
    m_last = tl.minimum((row0 + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    lo = 0
    hi = seqlen_k
    if right is not None:
        hi = tl.minimum(hi, m_last + diagonal + right + 1)
    if left is not None:
        lo = tl.maximum(row0 // GROUP + diagonal - left, 0)
    start = lo // BLOCK_N * BLOCK_N
    tiles = tl.maximum(hi - start + BLOCK_N - 1, 0) // BLOCK_N
    begin, end = _share_of(split, tiles, num_splits, least)
    first = start + begin * BLOCK_N
    last = start + end * BLOCK_N

    nheads = nheads_k * GROUP
    h = h_k * GROUP
    wide = b.to(tl.int64)
    part_row = 0
    if part_ptr is not None:
        part_row = split.to(tl.int64) * part_rows + wide * seqlen_q * nheads + h
        if (begin == end) & (split > 0):
            r = row0 + tl.arange(0, BLOCK_M)
            row = part_row + (r // GROUP).to(tl.int64) * nheads + r % GROUP
            nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            tl.store(part_ptr + part_lse + row, nothing, mask=r < seqlen_q * GROUP)
            return
    q_ptr += wide * q_b + h.to(tl.int64) * q_h
    k_place = h_k.to(tl.int64) * k_h
    v_place = h_k.to(tl.int64) * v_h
    if table_ptr is None:
        k_place += wide * k_b
        v_place += wide * v_b
    else:
        table_ptr += wide * table_b
    k_ptr += tl.multiple_of(k_place, ALIGN)
    v_ptr += tl.multiple_of(v_place, ALIGN)
    if slopes_ptr is not None:
        slopes_ptr += wide * slopes_b + h
    if sinks_ptr is not None:
        sinks_ptr += h
    o_ptr += (wide * seqlen_q * nheads + h) * HEADDIM_V
    lse_ptr += (wide * nheads + h) * seqlen_q

    acc, acc2, top, total = _attend(
        q_ptr, k_ptr, v_ptr, table_ptr, slopes_ptr, sinks_ptr, q_m, q_h, k_b, k_n, v_b, v_n, row0, seqlen_q, split,
        first, last, lo, hi, diagonal, left, right, scale, softcap, GROUP, HEADDIM, HEADDIM_V, BLOCK_SIZE, FOLD, SHARED,
        ALIGN, TF32, BLOCK_M, BLOCK_N, D, D2, DV, DV2, False,
    )  # fmt: skip
    lost = False
    if SEVERAL:
        lost = any_lost(acc)
        if DV2 > 0:
            lost = lost | any_lost(acc2)
    if lost:
        for step in tl.range(0, BLOCK_M // _LOST_M, num_stages=1):
            row = row0 + step * _LOST_M
            acc_safe, acc2_safe, top_safe, total_safe = _attend(
                q_ptr, k_ptr, v_ptr, table_ptr, slopes_ptr, sinks_ptr, q_m, q_h, k_b, k_n, v_b, v_n, row, seqlen_q,
                split, first, last, lo, hi, diagonal, left, right, scale, softcap, GROUP, HEADDIM, HEADDIM_V,
                BLOCK_SIZE, FOLD, SHARED, ALIGN, TF32, _LOST_M, _LOST_N, D, D2, DV, DV2, True,
            )  # fmt: skip
            _finish(
                acc_safe, acc2_safe, top_safe, total_safe, o_ptr, lse_ptr, part_ptr, row, seqlen_q, nheads, part_row,
                part_lse, GROUP, HEADDIM_V, _LOST_M, DV, DV2,
            )  # fmt: skip
    else:
        _finish(
            acc, acc2, top, total, o_ptr, lse_ptr, part_ptr, row0, seqlen_q, nheads, part_row, part_lse, GROUP,
            HEADDIM_V, BLOCK_M, DV, DV2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["part_rows", "part_lse", "num_splits", "nheads", "seqlen_q"])
def attention_combine_kernel(
    part_ptr, o_ptr, lse_ptr, part_rows, part_lse, num_splits, nheads, seqlen_q,
    HEADDIM_V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One row of o and lse from its splits, always added in the same order: lse = logaddexp, o weighted by exp(lse).

    Grid: batch · seqlen_q · nheads. Registers: [BLOCK_S, DV] in float32. Bound by memory: the partial results are read
    once, those of splits without keys not at all.
    """
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    lse_ptr_part = part_ptr + part_lse + row
    lse = tl.load(lse_ptr_part + s.to(tl.int64) * part_rows, mask=s < num_splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - shift), axis=0)
    d = tl.arange(0, DV)
    acc = tl.zeros((DV,), tl.float32)
    for first in tl.range(0, num_splits, BLOCK_S):
        t = first + tl.arange(0, BLOCK_S)
        place = t.to(tl.int64) * part_rows
        weight = tl.load(lse_ptr_part + place, mask=t < num_splits, other=float("-inf"))
        live = (weight != float("-inf"))[:, None] & (d < HEADDIM_V)[None, :]
        cells = part_ptr + ((row + place) * HEADDIM_V)[:, None] + d[None, :]
        part = tl.load(cells, mask=live, other=0.0)  # [BLOCK_S, DV]
        acc += tl.sum(part * tl.exp2(weight - shift)[:, None], axis=0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    o = (acc / total).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + row * HEADDIM_V + d, o, mask=d < HEADDIM_V)
    h = row % nheads
    m = row // nheads % seqlen_q
    b = row // nheads // seqlen_q
    lse = tl.where(empty, float("-inf"), (shift + tl.log2(total)) * LN2)
    tl.store(lse_ptr + (b * nheads + h) * seqlen_q + m, lse)


def _alignment(k_strides: tuple[int, ...], v_strides: tuple[int, ...], dtype: torch.dtype) -> int:
    """Elements of 16 bytes if the rows of both caches start at multiples of that, else 1."""
    each = 4 if dtype is torch.float32 else 8
    k_b, k_n, k_h, _ = k_strides
    v_b, v_n, v_h, _ = v_strides
    return 1 if (k_b | k_n | k_h | v_b | v_n | v_h) & (each - 1) else each


@functools.cache
def _starts(headdim: int, headdim_v: int) -> bool:
    """Does the first part of a row of k hold a row of v that shares its storage?"""
    d, _ = split(headdim)
    return headdim_v <= headdim and split(headdim_v) == (d, 0)


@functools.lru_cache(4096)
def _plan(
    tile: DecodeRow, batch: int, nheads: int, nheads_k: int, seqlen_q: int, capacity: int, headdim: int, headdim_v: int,
    block_size: int | None, upper_left: bool, fold: bool, one_storage: bool, align: int, tf32: bool,
    num_splits: int | None, sms: int,
) -> tuple[int, int, int, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Blocks of rows, splits, the tiles that a split has at least, and the constants of both kernels."""
    group = nheads // nheads_k
    d, d2 = split(headdim)
    dv, dv2 = split(headdim_v)
    blocks_m = launch.cdiv(seqlen_q * group, tile.BLOCK_M)
    least = 1
    if num_splits is None:
        least = launch.cdiv(FEWEST_KEYS, tile.BLOCK_N)
        num_splits = splits(blocks_m * nheads_k * batch, capacity, sms * tile.per_sm)
    constants = {
        "GROUP": group, "HEADDIM": headdim, "HEADDIM_V": headdim_v, "BLOCK_SIZE": block_size or 1,
        "UPPER_LEFT": upper_left, "FOLD": fold, "SEVERAL": seqlen_q > 1,
        "SHARED": one_storage, "ALIGN": align, "TF32": tf32,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "D": d, "D2": d2, "DV": dv, "DV2": dv2,
    }  # fmt: skip
    width, whole = launch.next_power_of_2(headdim_v), launch.next_power_of_2(num_splits)
    combining = {"HEADDIM_V": headdim_v, "SPLITS": whole, "BLOCK_S": max(1, min(whole, 2048 // width)), "DV": width}
    return blocks_m, num_splits, least, constants, combining


def kvcache(
    spec: Any,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    o: Tensor,
    lse: Tensor,
) -> None:
    if k is not None and v is not None:
        q = append(spec, q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin)
    (
        dtype, _, batch, nheads, nheads_k, seqlen_q, capacity, headdim, headdim_v, left, right, upper_left, scale,
        softcap, alibi, _, seqlen_new, block_size, _, _, num_splits, _,
    ) = spec  # fmt: skip
    device = q.device
    k_strides, v_strides = k_cache.stride(), v_cache.stride()
    one_storage = k_strides == v_strides and k_cache.data_ptr() == v_cache.data_ptr() and _starts(headdim, headdim_v)
    align = _alignment(k_strides, v_strides, dtype)
    tile = row_of(spec, device, one_storage, align)
    blocks_m, num_splits, least, constants, combining = _plan(
        tile, batch, nheads, nheads_k, seqlen_q, capacity, headdim, headdim_v, block_size, upper_left,
        scale >= SMALLEST_SCALE and softcap is None and not alibi, one_storage, align,
        dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32, num_splits, launch.sms(device),
    )  # fmt: skip
    rows, part = batch * seqlen_q * nheads, None
    if num_splits > 1:
        part = lse.new_empty(num_splits * rows * (headdim_v + 1))
    part_lse = num_splits * rows * headdim_v
    longest = seqlen_q + capacity
    launch.run(
        attention_decode_kernel,
        (blocks_m * nheads_k * num_splits * batch,),
        (q, k_cache, v_cache, cache_seqlens, block_table, alibi_slopes, sinks, o, lse, part),
        (
            *q.stride()[:3], *k_strides[:3], *v_strides[:3], None if block_table is None else block_table.stride(0),
            None if alibi_slopes is None else 0 if alibi_slopes.dim() == 1 else alibi_slopes.stride(0),
            nheads_k, seqlen_q, seqlen_new, capacity, blocks_m, num_splits, least, rows, part_lse,
            left if left is None else min(left, longest), right if right is None else min(right, longest),
            float(scale), None if softcap is None else float(softcap),
        ),
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if part is not None:
        sizes = (rows, part_lse, num_splits, nheads, seqlen_q)
        launch.run(attention_combine_kernel, (rows,), (part, o, lse), sizes, combining, num_warps=4)
