"""The backward kernel of the keys: dk and dv."""

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
    dot_seen,
    head_of,
    kept,
    load_pairs,
    load_slice,
    query_range,
    seen_range,
    still_zero,
    store_rows,
)


@triton.jit
def _dkdv_walk(
    dk, dk2, dv, dv2, k_tile, k2_tile, v_tile, v2_tile, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, q_m, q_h, k_n,
    v_n, do_m, do_h, lse_h, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m, bias_n, slopes_ptr, philox_ptr,
    first_head, n0, d0, first, count, jump_at, jump, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap,
    threshold, upscale, GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    BIAS_COLS: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr,
    MASKED: tl.constexpr, SAFE: tl.constexpr, WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr, SLICE: tl.constexpr,
    ANEW: tl.constexpr = False, zero=0,
):  # fmt: skip
    """`count` tiles of queries of each head of the group, transposed; jump_at and jump as for dq.

    SAFE: dk or dv has the SLICE columns from d0 on alone.
    """
    i = tl.arange(0, BLOCK_M)[None, :]
    j = tl.arange(0, BLOCK_N)[:, None]
    per_head = tl.maximum(count, 1)
    before = zero
    for step in tl.range(0, count * GROUP, num_stages=1 if SAFE else None):
        if GROUP == 1:
            g = first_head * 0
            tile = step
        else:
            g = step // per_head
            tile = step - g * per_head
        m0 = first + tile * BLOCK_M
        if MASKED:
            m0 += tl.where(tile >= jump_at, jump, 0)
        here = before
        if ANEW:
            zero = still_zero(zero, m0)
            if MASKED:
                here = zero
        wide = g.to(tl.int64)
        seen = None
        if mask_ptr is not None:
            seen = load_pairs(
                mask_ptr + wide * mask_h, mask_m, mask_n, m0, n0, i, j, seqlen_q, seqlen_k, MASK_ROWS, MASK_COLS, True
            )
            seen = seen != 0
        q_tile, q2_tile = load_block(q_ptr + wide * q_h, q_m, m0, seqlen_q, BLOCK_M, D, D2, HEADDIM, MASKED, here)
        m = m0 + tl.arange(0, BLOCK_M)
        if MASKED:
            lse = tl.load(lse_ptr + wide * lse_h + m, mask=m < seqlen_q, other=0.0)
            delta = tl.load(delta_ptr + wide * lse_h + m, mask=m < seqlen_q, other=0.0)
        else:
            lse = tl.load(lse_ptr + wide * lse_h + m)
            delta = tl.load(delta_ptr + wide * lse_h + m)
        s = dot_rows(
            k_tile, k2_tile, k_ptr, k_n, n0, seqlen_k, q_tile, q2_tile, q_ptr + wide * q_h, q_m, m0, seqlen_q, BLOCK_N,
            BLOCK_M, D2, HEADDIM, TF32, MASKED, SAFE, here,
        )  # fmt: skip
        bias = None
        if bias_ptr is not None:
            bias = load_pairs(
                bias_ptr + wide * bias_h, bias_m, bias_n, m0, n0, i, j, seqlen_q, seqlen_k, BIAS_ROWS, BIAS_COLS,
                True,
            )  # fmt: skip
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + g)
        p, t, visible = probabilities(
            s, lse[None, :], m0 + here + i, n0 + here + j, seen, bias, slope, seqlen_q, seqlen_k, diagonal, left, right,
            scale, softcap, FOLD, k_tile.dtype == tl.float32, MASKED,
        )  # fmt: skip
        keep = None
        weights = p
        if philox_ptr is not None:
            keep = kept(philox_ptr, first_head + g + here, m0, n0 + here, threshold, BLOCK_M, BLOCK_N, True)
            weights = tl.where(keep, p, 0.0)
        do_tile, do2_tile = load_block(
            do_ptr + wide * do_h, do_m, m0, seqlen_q, BLOCK_M, DV, DV2, HEADDIM_V, MASKED, here
        )
        if WANTS_DV and SAFE:
            part = load_slice(do_ptr + wide * do_h, do_m, m0, seqlen_q, d0, BLOCK_M, SLICE, HEADDIM_V, True, here)
            dv = dot_seen(weights.to(part.dtype), part, dv, visible, TF32)
        elif WANTS_DV:
            dv, dv2 = accumulate(dv, dv2, weights, do_tile, do2_tile, visible, DV2, TF32, False)
        if WANTS_DK:
            dp = dot_rows(
                v_tile, v2_tile, v_ptr, v_n, n0, seqlen_k, do_tile, do2_tile, do_ptr + wide * do_h, do_m, m0, seqlen_q,
                BLOCK_N, BLOCK_M, DV2, HEADDIM_V, TF32, MASKED, SAFE, here,
            )  # fmt: skip
            ds = score_gradient(p, dp, delta[None, :], keep, upscale, visible, MASKED)
            ds = before_softcap(ds, t, softcap, visible, MASKED)
            if SAFE:
                part = load_slice(q_ptr + wide * q_h, q_m, m0, seqlen_q, d0, BLOCK_M, SLICE, HEADDIM, True, here)
                dk = dot_seen(ds.to(part.dtype), part, dk, visible, TF32)
            else:
                dk, dk2 = accumulate(dk, dk2, ds, q_tile, q2_tile, visible, D2, TF32, False)
    return dk, dk2, dv, dv2, zero


@triton.jit
def _dk_store(
    dk, dk2, dk_ptr, dk_n, n0, seqlen_k, scale, HEADDIM: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, zero=0,
):  # fmt: skip
    dk_ptr += n0.to(tl.int64) * dk_n
    store_rows(dk_ptr, dk_n, seqlen_k - n0, dk * scale, BLOCK_N, D, 0, HEADDIM, zero)
    if D2 > 0:
        store_rows(dk_ptr, dk_n, seqlen_k - n0, dk2 * scale, BLOCK_N, D2, D, HEADDIM, zero)


@triton.jit
def _dv_store(
    dv, dv2, dv_ptr, dv_n, n0, seqlen_k, upscale, HEADDIM_V: tl.constexpr, BLOCK_N: tl.constexpr, DV: tl.constexpr,
    DV2: tl.constexpr, zero=0,
):  # fmt: skip
    if upscale is not None:
        dv = dv * upscale
        dv2 = dv2 * upscale
    dv_ptr += n0.to(tl.int64) * dv_n
    store_rows(dv_ptr, dv_n, seqlen_k - n0, dv, BLOCK_N, DV, 0, HEADDIM_V, zero)
    if DV2 > 0:
        store_rows(dv_ptr, dv_n, seqlen_k - n0, dv2, BLOCK_N, DV2, DV, HEADDIM_V, zero)


@triton.jit
def _store_slice(
    ptr, stride, first, limit, d0, x, ROWS: tl.constexpr, SLICE: tl.constexpr, HEADDIM: tl.constexpr, zero
):  # fmt: skip
    """The counterpart of load_slice, rounding x to the type of ptr."""
    row = first + (tl.arange(0, ROWS) + zero * 16)
    d = d0 + tl.arange(0, SLICE)
    inside = (row < limit)[:, None] & (d < HEADDIM)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dkdv_again(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, q_m, q_h, k_n, v_n, do_m, do_h, dk_n, dv_n, lse_h,
    mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m, bias_n, slopes_ptr, philox_ptr, first_head, n0, n1,
    seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale,
    GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    BIAS_COLS: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr, ANEW: tl.constexpr, zero,
):  # fmt: skip
    """dk, dv of keys [n0, n1) once more, in few registers, such that 0 · NaN of a query that may not see a key is 0."""
    SLICE: tl.constexpr = min(D, 64)
    SLICE_V: tl.constexpr = min(DV, 64)
    for step in tl.range(0, (n1 - n0 + LOST_M - 1) // LOST_M, num_stages=1):
        n = n0 + step * LOST_M
        if ANEW:
            zero = still_zero(zero, n)
        k_tile, k2_tile = load_block(k_ptr, k_n, n, seqlen_k, LOST_M, D, D2, HEADDIM, True, zero)
        v_tile, v2_tile = load_block(v_ptr, v_n, n, seqlen_k, LOST_M, DV, DV2, HEADDIM_V, True, zero)
        lo, before, whole, after = query_range(
            n, tl.minimum(n + LOST_M, seqlen_k), diagonal, left, right, seqlen_q, LOST_N
        )
        for d0 in tl.range(0, HEADDIM_V, SLICE_V, num_stages=1):
            part = tl.zeros((LOST_M, SLICE_V), tl.float32)
            _, _, part, _, _ = _dkdv_walk(
                part, part, part, part, k_tile, k2_tile, v_tile, v2_tile, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr,
                q_m, q_h, k_n, v_n, do_m, do_h, lse_h, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m,
                bias_n, slopes_ptr, philox_ptr, first_head, n, d0, lo, before + whole + after, 0, 0, seqlen_q, seqlen_k,
                diagonal, left, right, scale, softcap, threshold, upscale, GROUP, MASK_ROWS, MASK_COLS, BIAS_ROWS,
                BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, LOST_N, LOST_M, D, D2, DV, DV2, TF32, True, True, False, True,
                SLICE_V, ANEW, zero,
            )  # fmt: skip
            if upscale is not None:
                part = part * upscale
            _store_slice(dv_ptr, dv_n, n, seqlen_k, d0, part, LOST_M, SLICE_V, HEADDIM_V, zero)
        for d0 in tl.range(0, HEADDIM, SLICE, num_stages=1):
            part = tl.zeros((LOST_M, SLICE), tl.float32)
            part, _, _, _, _ = _dkdv_walk(
                part, part, part, part, k_tile, k2_tile, v_tile, v2_tile, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr,
                q_m, q_h, k_n, v_n, do_m, do_h, lse_h, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m,
                bias_n, slopes_ptr, philox_ptr, first_head, n, d0, lo, before + whole + after, 0, 0, seqlen_q, seqlen_k,
                diagonal, left, right, scale, softcap, threshold, upscale, GROUP, MASK_ROWS, MASK_COLS, BIAS_ROWS,
                BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, LOST_N, LOST_M, D, D2, DV, DV2, TF32, True, True, True, False,
                SLICE, ANEW, zero,
            )  # fmt: skip
            _store_slice(dk_ptr, dk_n, n, seqlen_k, d0, part * scale, LOST_M, SLICE, HEADDIM, zero)


@triton.jit
def _block(
    work, works, zero,
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr,
    cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m, do_h,
    mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads_k, seqlen_q, seqlen_k, blocks_n, lse_stride, left, right, scale, softcap, threshold, upscale,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, ANEW: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """Block `work` of the kernel below. works: how many there are, in a persistent grid, else None. zero: there of
    `still_zero`, so that no address is kept from one block for the next."""
    n0 = work % blocks_n * BLOCK_N
    hk = work // blocks_n % nheads_k
    b = work // blocks_n // nheads_k
    h = hk * GROUP
    nheads = nheads_k * GROUP
    row = b.to(tl.int64)
    q_head = head_of(q_ptr, q_b, q_m, q_h, b, h, cu_q_ptr)
    k_head = head_of(k_ptr, k_b, k_n, k_h, b, hk, cu_k_ptr)
    v_head = head_of(v_ptr, v_b, v_n, v_h, b, hk, cu_k_ptr)
    do_head = head_of(do_ptr, do_b, do_m, do_h, b, h, cu_q_ptr)
    if cu_q_ptr is None:
        first_row = row * seqlen_k
        first_lse = (row * nheads + h) * lse_stride
    else:
        start_q = tl.load(cu_q_ptr + b)
        start_k = tl.load(cu_k_ptr + b)
        seqlen_q = tl.load(cu_q_ptr + b + 1) - start_q
        seqlen_k = tl.load(cu_k_ptr + b + 1) - start_k
        if works is not None:
            seqlen_q = tl.where(n0 < seqlen_k, seqlen_q, 0)  # a block beyond its sequence walks over nothing
        elif n0 >= seqlen_k:
            return
        first_row = start_k.to(tl.int64)
        first_lse = h.to(tl.int64) * lse_stride + start_q
    lse_ptr += first_lse
    delta_ptr += first_lse
    dk_n = nheads_k * HEADDIM
    dv_n = nheads_k * HEADDIM_V
    dk_ptr += first_row * dk_n + hk * HEADDIM
    dv_ptr += first_row * dv_n + hk * HEADDIM_V
    diagonal = 0 if UPPER_LEFT else seqlen_k - seqlen_q
    head = b * nheads + h
    if mask_ptr is not None:
        mask_ptr += row * mask_b + h.to(tl.int64) * mask_h
    if bias_ptr is not None:
        bias_ptr += row * bias_b + h.to(tl.int64) * bias_h
    if slopes_ptr is not None:
        slopes_ptr += row * slopes_b + h

    k_tile, k2_tile = load_block(k_head, k_n, n0, seqlen_k, BLOCK_N, D, D2, HEADDIM, True, zero)
    v_tile, v2_tile = load_block(v_head, v_n, n0, seqlen_k, BLOCK_N, DV, DV2, HEADDIM_V, True, zero)
    n1 = tl.minimum(n0 + BLOCK_N, seqlen_k)
    lo, before, whole, after = query_range(n0, n1, diagonal, left, right, seqlen_q, BLOCK_M)
    if not WHOLE:
        before, whole, after = before + whole + after, 0, 0
    if mask_ptr is not None:
        i = tl.arange(0, BLOCK_M)[None, :]
        j = tl.arange(0, BLOCK_N)[:, None]
        hidden, before = seen_range(
            mask_ptr, mask_h, mask_m, mask_n, lo, n0, BLOCK_M, 0, before, i, j, seqlen_q, seqlen_k, GROUP, MASK_ROWS,
            MASK_COLS,
        )  # fmt: skip
        lo += hidden * BLOCK_M
    TWICE: tl.constexpr = k_ptr.dtype.element_ty == tl.float32 and not TF32 and D + D2 + DV + DV2 > 512
    dk, dk2 = zero_block(BLOCK_N, D, D2)
    dv, dv2 = zero_block(BLOCK_N, DV, DV2)
    lost = False
    for turn in tl.static_range(2 if TWICE else 1):  # dv, then dk: wide float32 rows take too many registers at once
        if MASKED:
            dk, dk2, dv, dv2, zero = _dkdv_walk(
                dk, dk2, dv, dv2, k_tile, k2_tile, v_tile, v2_tile, q_head, k_head, v_head, do_head, lse_ptr, delta_ptr,
                q_m, q_h, k_n, v_n, do_m, do_h, lse_stride, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m,
                bias_n, slopes_ptr, philox_ptr, head, n0, 0, lo, before + after, before, whole * BLOCK_M, seqlen_q,
                seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale, GROUP, MASK_ROWS, MASK_COLS,
                BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2, TF32, True, False,
                not TWICE or turn == 1, turn == 0, 0, ANEW, zero,
            )  # fmt: skip
        if WHOLE:
            dk, dk2, dv, dv2, zero = _dkdv_walk(
                dk, dk2, dv, dv2, k_tile, k2_tile, v_tile, v2_tile, q_head, k_head, v_head, do_head, lse_ptr, delta_ptr,
                q_m, q_h, k_n, v_n, do_m, do_h, lse_stride, None, mask_h, mask_m, mask_n, None, bias_h, bias_m, bias_n,
                slopes_ptr, philox_ptr, head, n0, 0, lo + before * BLOCK_M, whole, 0, 0, seqlen_q, seqlen_k, diagonal,
                left, right, scale, softcap, threshold, upscale, GROUP, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS,
                HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2, TF32, False, False, not TWICE or turn == 1,
                turn == 0, 0, ANEW, zero,
            )  # fmt: skip
        if MASKED:
            lost = lost | any_lost(dk) | any_lost(dv)
            if D2 > 0:
                lost = lost | any_lost(dk2)
            if DV2 > 0:
                lost = lost | any_lost(dv2)
        if TWICE and turn == 0:
            _dv_store(dv, dv2, dv_ptr, dv_n, n0, seqlen_k, upscale, HEADDIM_V, BLOCK_N, DV, DV2)
            dv, dv2 = zero_block(BLOCK_N, DV, DV2)
    if lost:
        if ANEW:
            hk = (work + zero) // blocks_n % nheads_k
            b = (work + zero) // blocks_n // nheads_k
            q_head = head_of(q_ptr, q_b, q_m, q_h, b, hk * GROUP, cu_q_ptr)
            k_head = head_of(k_ptr, k_b, k_n, k_h, b, hk, cu_k_ptr)
            v_head = head_of(v_ptr, v_b, v_n, v_h, b, hk, cu_k_ptr)
            do_head = head_of(do_ptr, do_b, do_m, do_h, b, hk * GROUP, cu_q_ptr)
        _dkdv_again(
            q_head, k_head, v_head, do_head, dk_ptr, dv_ptr, lse_ptr, delta_ptr, q_m, q_h, k_n, v_n, do_m, do_h, dk_n,
            dv_n, lse_stride, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m, bias_n, slopes_ptr,
            philox_ptr, head, n0, n1, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale,
            GROUP, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, D, D2, DV, DV2, TF32, ANEW,
            zero,
        )  # fmt: skip
    else:
        _dk_store(dk, dk2, dk_ptr, dk_n, n0, seqlen_k, scale, HEADDIM, BLOCK_N, D, D2, zero)
        if not TWICE:
            _dv_store(dv, dv2, dv_ptr, dv_n, n0, seqlen_k, upscale, HEADDIM_V, BLOCK_N, DV, DV2, zero)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "blocks_n", "lse_stride", "left", "right", "threshold", "works"])
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr,
    cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m, do_h,
    mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads_k, seqlen_q, seqlen_k, blocks_n, lse_stride, left, right, scale, softcap, threshold, upscale, works,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, ANEW: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head of k and v: a walk over the queries of all heads that read it.

    Grid: blocks_n · nheads_k · batch, or fewer as in the forward; with a right edge the first keys have the longest
    walk. Registers: dk, dv [BLOCK_N, headdim], s and dp transposed [BLOCK_N, BLOCK_M] in float32; shared memory: k, v,
    and num_stages tiles of q and do. Bound by the tensor cores: 8 · headdim flops per pair.
    """
    zero = 0
    if works is None:
        _block(
            tl.program_id(0), works, zero, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, mask_ptr,
            bias_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr, philox_ptr, q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b,
            do_m, do_h, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n, slopes_b, nheads_k, seqlen_q,
            seqlen_k, blocks_n, lse_stride, left, right, scale, softcap, threshold, upscale, GROUP, HEADDIM, HEADDIM_V,
            UPPER_LEFT, FOLD, MASKED, WHOLE, ANEW, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, TF32, BLOCK_M, BLOCK_N,
            D, D2, DV, DV2,
        )  # fmt: skip
    else:
        for work in tl.range(tl.program_id(0), works, tl.num_programs(0), num_stages=1):
            zero = still_zero(zero, work)
            _block(
                work, works, zero, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, mask_ptr, bias_ptr,
                slopes_ptr, cu_q_ptr, cu_k_ptr, philox_ptr, q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m,
                do_h, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n, slopes_b, nheads_k, seqlen_q,
                seqlen_k, blocks_n, lse_stride, left, right, scale, softcap, threshold, upscale, GROUP, HEADDIM,
                HEADDIM_V, UPPER_LEFT, FOLD, MASKED, WHOLE, ANEW, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, TF32,
                BLOCK_M, BLOCK_N, D, D2, DV, DV2,
            )  # fmt: skip
