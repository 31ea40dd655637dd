"""The backward kernel of the queries: dq, and a dbias as large as the scores."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention._triton_bwd import (
    accumulate,
    before_softcap,
    load_block,
    probabilities,
    score_gradient,
    zero_block,
)
from fastattn.ops.attention._triton_score import (
    LOST_M,
    LOST_N,
    any_lost,
    dot_rows,
    head_of,
    kept,
    key_range,
    load_pairs,
    seen_range,
    still_zero,
    store_rows,
)


@triton.jit
def _dq_walk(
    dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_ptr, k_ptr, v_ptr, do_ptr, q_m, k_n, v_n, do_m, mask_ptr,
    mask_m, mask_n, bias_ptr, bias_m, bias_n, dbias_ptr, dbias_m, slope, philox_ptr, head, m0, first, count, jump_at,
    jump, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr, MASKED: tl.constexpr,
    SAFE: tl.constexpr, ANEW: tl.constexpr = False, zero=0,
):  # fmt: skip
    """`count` tiles of keys from `first` on; masked ones leave out the `jump` keys after tile `jump_at`."""
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    for step in tl.range(0, count, num_stages=1 if SAFE else None):
        n0 = first + step * BLOCK_N
        if MASKED:
            n0 += tl.where(step >= jump_at, jump, 0)
            if ANEW:
                zero = still_zero(zero, n0)
        seen = None
        if mask_ptr is not None:
            seen = load_pairs(mask_ptr, mask_m, mask_n, m0, n0, i, j, seqlen_q, seqlen_k, MASK_ROWS, MASK_COLS, True)
            seen = seen != 0
        k_tile, k2_tile = load_block(k_ptr, k_n, n0, seqlen_k, BLOCK_N, D, D2, HEADDIM, MASKED, zero)
        s = dot_rows(
            q_tile, q2_tile, q_ptr, q_m, m0, seqlen_q, k_tile, k2_tile, k_ptr, k_n, n0, seqlen_k, BLOCK_M, BLOCK_N, D2,
            HEADDIM, TF32, MASKED, SAFE, zero,
        )  # fmt: skip
        bias = None
        if bias_ptr is not None:
            bias = load_pairs(bias_ptr, bias_m, bias_n, m0, n0, i, j, seqlen_q, seqlen_k, BIAS_ROWS, BIAS_COLS, True)
        p, t, visible = probabilities(
            s, lse[:, None], m0 + zero + i, n0 + zero + j, seen, bias, slope, seqlen_q, seqlen_k, diagonal, left, right, scale,
            softcap, FOLD, q_tile.dtype == tl.float32, MASKED,
        )  # fmt: skip
        v_tile, v2_tile = load_block(v_ptr, v_n, n0, seqlen_k, BLOCK_N, DV, DV2, HEADDIM_V, MASKED, zero)
        dp = dot_rows(
            do_tile, do2_tile, do_ptr, do_m, m0, seqlen_q, v_tile, v2_tile, v_ptr, v_n, n0, seqlen_k, BLOCK_M, BLOCK_N,
            DV2, HEADDIM_V, TF32, MASKED, SAFE, zero,
        )  # fmt: skip
        keep = None
        if philox_ptr is not None:
            keep = kept(philox_ptr, head + zero, m0 + zero, n0, threshold, BLOCK_M, BLOCK_N, False)
        ds = score_gradient(p, dp, delta[:, None], keep, upscale, visible, MASKED)
        if dbias_ptr is not None:
            cells = (dbias_ptr + (m0 + i).to(tl.int64) * dbias_m) + (n0 + j)
            tl.store(cells, ds, mask=(m0 + i < seqlen_q) & (n0 + j < seqlen_k))
        ds = before_softcap(ds, t, softcap, visible, MASKED)
        dq, dq2 = accumulate(dq, dq2, ds, k_tile, k2_tile, visible, D2, TF32, SAFE)
    return dq, dq2, zero


@triton.jit
def _dq_store(
    dq, dq2, dq_ptr, dq_m, m0, seqlen_q, scale, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, zero=0,
):  # fmt: skip
    dq_ptr += m0.to(tl.int64) * dq_m
    store_rows(dq_ptr, dq_m, seqlen_q - m0, dq * scale, BLOCK_M, D, 0, HEADDIM, zero)
    if D2 > 0:
        store_rows(dq_ptr, dq_m, seqlen_q - m0, dq2 * scale, BLOCK_M, D2, D, HEADDIM, zero)


@triton.jit
def _dq_again(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, q_m, k_n, v_n, do_m, dq_m, mask_ptr, mask_m, mask_n,
    bias_ptr, bias_m, bias_n, slope, philox_ptr, head, m0, m1, seqlen_q, seqlen_k, diagonal, left, right, scale,
    softcap, threshold, upscale,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr,
    ANEW: tl.constexpr, zero,
):  # fmt: skip
    """dq of queries [m0, m1) once more, in few registers, such that 0 · NaN of a key that a query may not see is 0."""
    for step in tl.range(0, (m1 - m0 + LOST_M - 1) // LOST_M, num_stages=1):
        m = m0 + step * LOST_M
        if ANEW:
            zero = still_zero(zero, m)
        q_tile, q2_tile = load_block(q_ptr, q_m, m, seqlen_q, LOST_M, D, D2, HEADDIM, True, zero)
        do_tile, do2_tile = load_block(do_ptr, do_m, m, seqlen_q, LOST_M, DV, DV2, HEADDIM_V, True, zero)
        i = tl.arange(0, LOST_M)
        lse = tl.load(lse_ptr + m + i, mask=m + i < seqlen_q, other=0.0)
        delta = tl.load(delta_ptr + m + i, mask=m + i < seqlen_q, other=0.0)
        lo, before, whole, after = key_range(
            m, tl.minimum(m + LOST_M, seqlen_q), diagonal, left, right, seqlen_k, LOST_N
        )
        dq, dq2 = zero_block(LOST_M, D, D2)
        dq, dq2, _ = _dq_walk(
            dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_ptr, k_ptr, v_ptr, do_ptr, q_m, k_n, v_n, do_m,
            mask_ptr, mask_m, mask_n, bias_ptr, bias_m, bias_n, None, 0, slope, philox_ptr, head, m, lo,
            before + whole + after, 0, 0, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold,
            upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, LOST_M, LOST_N, D, D2, DV,
            DV2, TF32, True, True, ANEW, zero,
        )  # fmt: skip
        _dq_store(dq, dq2, dq_ptr, dq_m, m, seqlen_q, scale, HEADDIM, LOST_M, D, D2, zero)


@triton.jit
def _block(
    work, works, zero,
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr, mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr,
    cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m, do_h, dbias_b, dbias_h, dbias_m,
    mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride, left, right, scale, softcap, threshold, upscale,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, ANEW: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """Block `work` of the kernel below. works: how many there are, in a persistent grid, else None. zero: there of
    `still_zero`, so that no address is kept from one block for the next."""
    block = work % blocks_m
    if right is not None:
        block = blocks_m - 1 - block
    h = work // blocks_m % nheads
    b = work // blocks_m // nheads
    m0 = block * BLOCK_M
    row = b.to(tl.int64)
    q_head = head_of(q_ptr, q_b, q_m, q_h, b, h, cu_q_ptr)
    k_head = head_of(k_ptr, k_b, k_n, k_h, b, h // GROUP, cu_k_ptr)
    v_head = head_of(v_ptr, v_b, v_n, v_h, b, h // GROUP, cu_k_ptr)
    do_head = head_of(do_ptr, do_b, do_m, do_h, b, h, cu_q_ptr)
    if cu_q_ptr is None:
        first_row = row * seqlen_q
        first_lse = (row * nheads + h) * lse_stride
    else:
        start_q = tl.load(cu_q_ptr + b)
        start_k = tl.load(cu_k_ptr + b)
        seqlen_q = tl.load(cu_q_ptr + b + 1) - start_q
        seqlen_k = tl.load(cu_k_ptr + b + 1) - start_k
        if works is not None:
            seqlen_k = tl.where(m0 < seqlen_q, seqlen_k, 0)  # a block beyond its sequence walks over nothing
        elif m0 >= seqlen_q:
            return
        first_row = start_q.to(tl.int64)
        first_lse = h.to(tl.int64) * lse_stride + start_q
    lse_ptr += first_lse
    delta_ptr += first_lse
    dq_m = nheads * HEADDIM
    dq_ptr += first_row * dq_m + h * HEADDIM
    diagonal = 0 if UPPER_LEFT else seqlen_k - seqlen_q
    head = b * nheads + h
    if mask_ptr is not None:
        mask_ptr += row * mask_b + h.to(tl.int64) * mask_h
    if bias_ptr is not None:
        bias_ptr += row * bias_b + h.to(tl.int64) * bias_h
    if dbias_ptr is not None:
        dbias_ptr += row * dbias_b + h.to(tl.int64) * dbias_h
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + row * slopes_b + h)

    q_tile, q2_tile = load_block(q_head, q_m, m0, seqlen_q, BLOCK_M, D, D2, HEADDIM, True, zero)
    do_tile, do2_tile = load_block(do_head, do_m, m0, seqlen_q, BLOCK_M, DV, DV2, HEADDIM_V, True, zero)
    i = tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + m0 + i, mask=m0 + i < seqlen_q, other=0.0)
    delta = tl.load(delta_ptr + m0 + i, mask=m0 + i < seqlen_q, other=0.0)
    m1 = tl.minimum(m0 + BLOCK_M, seqlen_q)
    lo, before, whole, after = key_range(m0, m1, diagonal, left, right, seqlen_k, BLOCK_N)
    if not WHOLE:
        before, whole, after = before + whole + after, 0, 0
    if mask_ptr is not None:
        hidden, before = seen_range(
            mask_ptr, 0, mask_m, mask_n, m0, lo, 0, BLOCK_N, before, i[:, None], tl.arange(0, BLOCK_N)[None, :],
            seqlen_q, seqlen_k, 1, MASK_ROWS, MASK_COLS,
        )  # fmt: skip
        lo += hidden * BLOCK_N
    dq, dq2 = zero_block(BLOCK_M, D, D2)
    if MASKED:
        dq, dq2, zero = _dq_walk(
            dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_head, k_head, v_head, do_head, q_m, k_n, v_n,
            do_m, mask_ptr, mask_m, mask_n, bias_ptr, bias_m, bias_n, dbias_ptr, dbias_m, slope, philox_ptr, head, m0,
            lo, before + after, before, whole * BLOCK_N, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap,
            threshold, upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N,
            D, D2, DV, DV2, TF32, True, False, ANEW, zero,
        )  # fmt: skip
    if WHOLE:
        dq, dq2, zero = _dq_walk(
            dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_head, k_head, v_head, do_head, q_m, k_n, v_n,
            do_m, None, mask_m, mask_n, None, bias_m, bias_n, None, dbias_m, slope, philox_ptr, head, m0, lo + before *
            BLOCK_N, whole, 0, 0, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale,
            MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2,
            TF32, False, False, ANEW, zero,
        )  # fmt: skip
    lost = False
    if MASKED:
        lost = any_lost(dq)
        if D2 > 0:
            lost = lost | any_lost(dq2)
    if lost:
        if ANEW:
            q_head = head_of(q_ptr, q_b, q_m, q_h, b + zero, h + zero, cu_q_ptr)
            k_head = head_of(k_ptr, k_b, k_n, k_h, b + zero, (h + zero) // GROUP, cu_k_ptr)
            v_head = head_of(v_ptr, v_b, v_n, v_h, b + zero, (h + zero) // GROUP, cu_k_ptr)
            do_head = head_of(do_ptr, do_b, do_m, do_h, b + zero, h + zero, cu_q_ptr)
        _dq_again(
            q_head, k_head, v_head, do_head, dq_ptr, lse_ptr, delta_ptr, q_m, k_n, v_n, do_m, dq_m, mask_ptr, mask_m,
            mask_n, bias_ptr, bias_m, bias_n, slope, philox_ptr, head, m0, m1, seqlen_q, seqlen_k, diagonal, left,
            right, scale, softcap, threshold, upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V,
            FOLD, D, D2, DV, DV2, TF32, ANEW, zero,
        )  # fmt: skip
    else:
        _dq_store(dq, dq2, dq_ptr, dq_m, m0, seqlen_q, scale, HEADDIM, BLOCK_M, D, D2, zero)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "blocks_m", "lse_stride", "left", "right", "threshold", "works"])
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr, mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr,
    cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m, do_h, dbias_b, dbias_h, dbias_m,
    mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride, left, right, scale, softcap, threshold, upscale, works,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, ANEW: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and their rows of a full-size dbias.

    Grid: blocks_m · nheads · batch, in the forward's order, or fewer. Registers: dq [BLOCK_M, D + D2], s and dp
    [BLOCK_M, BLOCK_N] in float32; shared memory: q, do, and num_stages tiles of k and v. Bound by the tensor cores:
    6 · headdim flops per pair.
    """
    zero = 0
    if works is None:
        _block(
            tl.program_id(0), works, zero, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr,
            mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr, philox_ptr, q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n,
            v_h, do_b, do_m, do_h, dbias_b, dbias_h, dbias_m, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m,
            bias_n, slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride, left, right, scale, softcap, threshold,
            upscale, GROUP, HEADDIM, HEADDIM_V, UPPER_LEFT, FOLD, MASKED, WHOLE, ANEW, MASK_ROWS, MASK_COLS, BIAS_ROWS,
            BIAS_COLS, TF32, BLOCK_M, BLOCK_N, D, D2, DV, DV2,
        )  # fmt: skip
    else:
        for work in tl.range(tl.program_id(0), works, tl.num_programs(0), num_stages=1):
            zero = still_zero(zero, work)
            _block(
                work, works, zero, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr, mask_ptr,
                bias_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr, philox_ptr, q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
                do_b, do_m, do_h, dbias_b, dbias_h, dbias_m, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m,
                bias_n, slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride, left, right, scale, softcap,
                threshold, upscale, GROUP, HEADDIM, HEADDIM_V, UPPER_LEFT, FOLD, MASKED, WHOLE, ANEW, MASK_ROWS,
                MASK_COLS, BIAS_ROWS, BIAS_COLS, TF32, BLOCK_M, BLOCK_N, D, D2, DV, DV2,
            )  # fmt: skip
