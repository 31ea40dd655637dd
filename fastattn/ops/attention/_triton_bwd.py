"""The backward kernels. README.md derives them: dS = P (dP - delta), dq = scale dS k, dk = scale dSᵀ q, dv = Pᵀ do.

Every gradient is owned by one program that adds up its terms in a fixed order: dq by a block of queries, dk and dv by a
block of keys, which walks over all query heads of its group. So there are no atomics, and equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention._triton_score import (
    LOG2E,
    LOST_M,
    LOST_N,
    any_lost,
    band,
    dot,
    dot_rows,
    dot_seen,
    kept,
    key_range,
    load_pairs,
    load_rows,
    log2_score,
    query_range,
    seen_range,
    store_rows,
)


@triton.jit(do_not_specialize=["seqlen_q"])
def attention_bwd_delta_kernel(
    do_ptr, o_ptr, dlse_ptr, delta_ptr, do_b, do_m, do_h, o_b, o_m, o_h, nheads, seqlen_q,
    HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do ∘ o) - dlse for BLOCK_M queries of one head.

    Grid: cdiv(seqlen_q, BLOCK_M), nheads · batch; a packed call is one sequence here. Bound by memory: do and o once.
    """
    m0 = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    row = (head // nheads).to(tl.int64)
    h = (head % nheads).to(tl.int64)
    do_ptr += row * do_b + h * do_h + m0.to(tl.int64) * do_m
    o_ptr += row * o_b + h * o_h + m0.to(tl.int64) * o_m
    limit = seqlen_q - m0
    do_tile = load_rows(do_ptr, do_m, limit, BLOCK_M, DV, 0, HEADDIM_V, True).to(tl.float32)
    o_tile = load_rows(o_ptr, o_m, limit, BLOCK_M, DV, 0, HEADDIM_V, True).to(tl.float32)
    delta = tl.sum(do_tile * o_tile, axis=1)
    if DV2 > 0:
        do2_tile = load_rows(do_ptr, do_m, limit, BLOCK_M, DV2, DV, HEADDIM_V, True).to(tl.float32)
        o2_tile = load_rows(o_ptr, o_m, limit, BLOCK_M, DV2, DV, HEADDIM_V, True).to(tl.float32)
        delta += tl.sum(do2_tile * o2_tile, axis=1)
    i = tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * seqlen_q + m0 + i
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=i < limit, other=0.0)
    tl.store(delta_ptr + at, delta, mask=i < limit)


@triton.jit
def _probabilities(
    s, lse, m, n, seen, bias, slope, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, FOLD: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P of a tile of raw products, tanh of the softcap, and (with MASKED) which pairs are visible."""
    distance = None
    if slope is not None:
        distance = tl.abs((m + diagonal - n).to(tl.float32))
    s, t = log2_score(s, distance, slope, bias, scale, softcap, FOLD, EXACT)
    if not FOLD:
        p = tl.exp2(s - lse * LOG2E)
    elif EXACT:  # the difference before the factor, as plain PyTorch has it: one rounding of large numbers less
        p = tl.exp2((s * scale - lse) * LOG2E)
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse * LOG2E)
    visible = p
    if MASKED:
        visible = band(m, n, diagonal, left, right, seqlen_q, seqlen_k)
        if seen is not None:
            visible = visible & seen
        if bias is not None:
            visible = visible & (bias != float("-inf"))
        p = tl.where(visible, p, 0.0)
    return p, t, visible


@triton.jit
def _score_gradient(p, dp, delta, keep, upscale, visible, MASKED: tl.constexpr):
    """P (dP - delta), the gradient of the scores after softcap, ALiBi and bias."""
    if keep is not None:
        dp = tl.where(keep, dp * upscale, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    return ds


@triton.jit
def _before_softcap(ds, t, softcap, visible, MASKED: tl.constexpr):
    if softcap is not None:
        ds = ds * (1.0 - t * t)
        if MASKED:
            ds = tl.where(visible, ds, 0.0)
    return ds


@triton.jit
def _load_block(
    ptr, stride, first, limit, ROWS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, HEADDIM: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """The two parts of ROWS rows from row `first` on; without a second part, the first twice."""
    ptr += first.to(tl.int64) * stride
    x = load_rows(ptr, stride, limit - first, ROWS, D, 0, HEADDIM, CHECK)
    x2 = x
    if D2 > 0:
        x2 = load_rows(ptr, stride, limit - first, ROWS, D2, D, HEADDIM, CHECK)
    return x, x2


@triton.jit
def _accumulate(acc, acc2, w, x, x2, seen, D2: tl.constexpr, TF32: tl.constexpr, SAFE: tl.constexpr):
    """acc + w x for both parts."""
    w = w.to(x.dtype)
    if SAFE:
        acc = dot_seen(w, x, acc, seen, TF32)
        if D2 > 0:
            acc2 = dot_seen(w, x2, acc2, seen, TF32)
    else:
        acc = dot(w, x, acc, TF32)
        if D2 > 0:
            acc2 = dot(w, x2, acc2, TF32)
    return acc, acc2


@triton.jit
def _dq_walk(
    dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_ptr, k_ptr, v_ptr, do_ptr, q_m, k_n, v_n, do_m, mask_ptr,
    mask_m, mask_n, bias_ptr, bias_m, bias_n, dbias_ptr, dbias_m, slope, philox_ptr, head, m0, first, count, jump_at,
    jump, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr, MASKED: tl.constexpr,
    SAFE: tl.constexpr,
):  # fmt: skip
    """`count` tiles of keys from `first` on; masked ones leave out the `jump` keys after tile `jump_at`."""
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    for step in tl.range(0, count, num_stages=1 if SAFE else None):
        n0 = first + step * BLOCK_N
        if MASKED:
            n0 += tl.where(step >= jump_at, jump, 0)
        seen = None
        if mask_ptr is not None:
            seen = load_pairs(mask_ptr, mask_m, mask_n, m0, n0, i, j, seqlen_q, seqlen_k, MASK_ROWS, MASK_COLS, True)
            seen = seen != 0
        k_tile, k2_tile = _load_block(k_ptr, k_n, n0, seqlen_k, BLOCK_N, D, D2, HEADDIM, MASKED)
        s = dot_rows(
            q_tile, q2_tile, q_ptr, q_m, m0, seqlen_q, k_tile, k2_tile, k_ptr, k_n, n0, seqlen_k, BLOCK_M, BLOCK_N, D2,
            HEADDIM, TF32, MASKED, SAFE,
        )  # fmt: skip
        bias = None
        if bias_ptr is not None:
            bias = load_pairs(bias_ptr, bias_m, bias_n, m0, n0, i, j, seqlen_q, seqlen_k, BIAS_ROWS, BIAS_COLS, True)
        p, t, visible = _probabilities(
            s, lse[:, None], m0 + i, n0 + j, seen, bias, slope, seqlen_q, seqlen_k, diagonal, left, right, scale,
            softcap, FOLD, q_tile.dtype == tl.float32, MASKED,
        )  # fmt: skip
        v_tile, v2_tile = _load_block(v_ptr, v_n, n0, seqlen_k, BLOCK_N, DV, DV2, HEADDIM_V, MASKED)
        dp = dot_rows(
            do_tile, do2_tile, do_ptr, do_m, m0, seqlen_q, v_tile, v2_tile, v_ptr, v_n, n0, seqlen_k, BLOCK_M, BLOCK_N,
            DV2, HEADDIM_V, TF32, MASKED, SAFE,
        )  # fmt: skip
        keep = None
        if philox_ptr is not None:
            keep = kept(philox_ptr, head, m0, n0, threshold, BLOCK_M, BLOCK_N, False)
        ds = _score_gradient(p, dp, delta[:, None], keep, upscale, visible, MASKED)
        if dbias_ptr is not None:
            cells = (dbias_ptr + (m0 + i).to(tl.int64) * dbias_m) + (n0 + j)
            tl.store(cells, ds, mask=(m0 + i < seqlen_q) & (n0 + j < seqlen_k))
        ds = _before_softcap(ds, t, softcap, visible, MASKED)
        dq, dq2 = _accumulate(dq, dq2, ds, k_tile, k2_tile, visible, D2, TF32, SAFE)
    return dq, dq2


@triton.jit
def _dq_store(
    dq, dq2, dq_ptr, dq_m, m0, seqlen_q, scale, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr,
):  # fmt: skip
    dq_ptr += m0.to(tl.int64) * dq_m
    store_rows(dq_ptr, dq_m, seqlen_q - m0, dq * scale, BLOCK_M, D, 0, HEADDIM)
    if D2 > 0:
        store_rows(dq_ptr, dq_m, seqlen_q - m0, dq2 * scale, BLOCK_M, D2, D, HEADDIM)


@triton.jit
def _zeros(ROWS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr):
    return tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D2 if D2 > 0 else 1), tl.float32)


@triton.jit
def _dq_again(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, q_m, k_n, v_n, do_m, dq_m, mask_ptr, mask_m, mask_n,
    bias_ptr, bias_m, bias_n, slope, philox_ptr, head, m0, m1, seqlen_q, seqlen_k, diagonal, left, right, scale,
    softcap, threshold, upscale,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """dq of queries [m0, m1) once more, in few registers, such that 0 · NaN of a key that a query may not see is 0."""
    for step in tl.range(0, (m1 - m0 + LOST_M - 1) // LOST_M, num_stages=1):
        m = m0 + step * LOST_M
        q_tile, q2_tile = _load_block(q_ptr, q_m, m, seqlen_q, LOST_M, D, D2, HEADDIM, True)
        do_tile, do2_tile = _load_block(do_ptr, do_m, m, seqlen_q, LOST_M, DV, DV2, HEADDIM_V, True)
        i = tl.arange(0, LOST_M)
        lse = tl.load(lse_ptr + m + i, mask=m + i < seqlen_q, other=0.0)
        delta = tl.load(delta_ptr + m + i, mask=m + i < seqlen_q, other=0.0)
        lo, before, whole, after = key_range(
            m, tl.minimum(m + LOST_M, seqlen_q), diagonal, left, right, seqlen_k, LOST_N
        )
        dq, dq2 = _zeros(LOST_M, D, D2)
        dq, dq2 = _dq_walk(
            dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_ptr, k_ptr, v_ptr, do_ptr, q_m, k_n, v_n, do_m,
            mask_ptr, mask_m, mask_n, bias_ptr, bias_m, bias_n, None, 0, slope, philox_ptr, head, m, lo,
            before + whole + after, 0, 0, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold,
            upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, LOST_M, LOST_N, D, D2, DV,
            DV2, TF32, True, True,
        )  # fmt: skip
        _dq_store(dq, dq2, dq_ptr, dq_m, m, seqlen_q, scale, HEADDIM, LOST_M, D, D2)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "blocks_m", "lse_stride", "left", "right", "threshold"])
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr, mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr,
    cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m, do_h, dbias_b, dbias_h, dbias_m,
    mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride, left, right, scale, softcap, threshold, upscale,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and their rows of a full-size dbias.

    Grid: blocks_m · nheads · batch, in the forward's order. Registers: dq [BLOCK_M, D + D2], s and dp
    [BLOCK_M, BLOCK_N] in float32; shared memory: q, do, and num_stages tiles of k and v. Bound by the tensor cores:
    6 · headdim flops per pair.
    """
    pid = tl.program_id(0)
    block = pid % blocks_m
    if right is not None:
        block = blocks_m - 1 - block
    h = pid // blocks_m % nheads
    b = pid // blocks_m // nheads
    m0 = block * BLOCK_M
    row = b.to(tl.int64)
    q_ptr += h.to(tl.int64) * q_h
    do_ptr += h.to(tl.int64) * do_h
    k_ptr += (h // GROUP).to(tl.int64) * k_h
    v_ptr += (h // GROUP).to(tl.int64) * v_h
    if cu_q_ptr is None:
        q_ptr += row * q_b
        do_ptr += row * do_b
        k_ptr += row * k_b
        v_ptr += row * v_b
        first_row = row * seqlen_q
        first_lse = (row * nheads + h) * lse_stride
    else:
        start_q = tl.load(cu_q_ptr + b)
        start_k = tl.load(cu_k_ptr + b)
        seqlen_q = tl.load(cu_q_ptr + b + 1) - start_q
        seqlen_k = tl.load(cu_k_ptr + b + 1) - start_k
        if m0 >= seqlen_q:
            return
        q_ptr += start_q.to(tl.int64) * q_m
        do_ptr += start_q.to(tl.int64) * do_m
        k_ptr += start_k.to(tl.int64) * k_n
        v_ptr += start_k.to(tl.int64) * v_n
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

    q_tile, q2_tile = _load_block(q_ptr, q_m, m0, seqlen_q, BLOCK_M, D, D2, HEADDIM, True)
    do_tile, do2_tile = _load_block(do_ptr, do_m, m0, seqlen_q, BLOCK_M, DV, DV2, HEADDIM_V, True)
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
    dq, dq2 = _zeros(BLOCK_M, D, D2)
    if MASKED:
        dq, dq2 = _dq_walk(
            dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_ptr, k_ptr, v_ptr, do_ptr, q_m, k_n, v_n, do_m,
            mask_ptr, mask_m, mask_n, bias_ptr, bias_m, bias_n, dbias_ptr, dbias_m, slope, philox_ptr, head, m0, lo,
            before + after, before, whole * BLOCK_N, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap,
            threshold, upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N,
            D, D2, DV, DV2, TF32, True, False,
        )  # fmt: skip
    if WHOLE:
        dq, dq2 = _dq_walk(
            dq, dq2, q_tile, q2_tile, do_tile, do2_tile, lse, delta, q_ptr, k_ptr, v_ptr, do_ptr, q_m, k_n, v_n, do_m,
            None, mask_m, mask_n, None, bias_m, bias_n, None, dbias_m, slope, philox_ptr, head, m0,
            lo + before * BLOCK_N, whole, 0, 0, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold,
            upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV,
            DV2, TF32, False, False,
        )  # fmt: skip
    lost = False
    if MASKED:
        lost = any_lost(dq)
        if D2 > 0:
            lost = lost | any_lost(dq2)
    if lost:
        _dq_again(
            q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, q_m, k_n, v_n, do_m, dq_m, mask_ptr, mask_m,
            mask_n, bias_ptr, bias_m, bias_n, slope, philox_ptr, head, m0, m1, seqlen_q, seqlen_k, diagonal, left,
            right, scale, softcap, threshold, upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V,
            FOLD, D, D2, DV, DV2, TF32,
        )  # fmt: skip
    else:
        _dq_store(dq, dq2, dq_ptr, dq_m, m0, seqlen_q, scale, HEADDIM, BLOCK_M, D, D2)


@triton.jit
def _dkdv_walk(
    dk, dk2, dv, dv2, k_tile, k2_tile, v_tile, v2_tile, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, q_m, q_h, k_n,
    v_n, do_m, do_h, lse_h, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m, bias_n, slopes_ptr, philox_ptr,
    first_head, n0, first, count, jump_at, jump, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold,
    upscale, GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    BIAS_COLS: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr,
    MASKED: tl.constexpr, SAFE: tl.constexpr, WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr,
):  # fmt: skip
    """`count` tiles of queries of each head of the group, transposed; jump_at and jump as for dq."""
    i = tl.arange(0, BLOCK_M)[None, :]
    j = tl.arange(0, BLOCK_N)[:, None]
    per_head = tl.maximum(count, 1)
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
        wide = g.to(tl.int64)
        seen = None
        if mask_ptr is not None:
            seen = load_pairs(
                mask_ptr + wide * mask_h, mask_m, mask_n, m0, n0, i, j, seqlen_q, seqlen_k, MASK_ROWS, MASK_COLS, True
            )
            seen = seen != 0
        q_tile, q2_tile = _load_block(q_ptr + wide * q_h, q_m, m0, seqlen_q, BLOCK_M, D, D2, HEADDIM, MASKED)
        m = m0 + tl.arange(0, BLOCK_M)
        if MASKED:
            lse = tl.load(lse_ptr + wide * lse_h + m, mask=m < seqlen_q, other=0.0)
            delta = tl.load(delta_ptr + wide * lse_h + m, mask=m < seqlen_q, other=0.0)
        else:
            lse = tl.load(lse_ptr + wide * lse_h + m)
            delta = tl.load(delta_ptr + wide * lse_h + m)
        s = dot_rows(
            k_tile, k2_tile, k_ptr, k_n, n0, seqlen_k, q_tile, q2_tile, q_ptr + wide * q_h, q_m, m0, seqlen_q, BLOCK_N,
            BLOCK_M, D2, HEADDIM, TF32, MASKED, SAFE,
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
        p, t, visible = _probabilities(
            s, lse[None, :], m0 + i, n0 + j, seen, bias, slope, seqlen_q, seqlen_k, diagonal, left, right, scale,
            softcap, FOLD, k_tile.dtype == tl.float32, MASKED,
        )  # fmt: skip
        keep = None
        weights = p
        if philox_ptr is not None:
            keep = kept(philox_ptr, first_head + g, m0, n0, threshold, BLOCK_M, BLOCK_N, True)
            weights = tl.where(keep, p, 0.0)
        do_tile, do2_tile = _load_block(do_ptr + wide * do_h, do_m, m0, seqlen_q, BLOCK_M, DV, DV2, HEADDIM_V, MASKED)
        if WANTS_DV:
            dv, dv2 = _accumulate(dv, dv2, weights, do_tile, do2_tile, visible, DV2, TF32, SAFE)
        if WANTS_DK:
            dp = dot_rows(
                v_tile, v2_tile, v_ptr, v_n, n0, seqlen_k, do_tile, do2_tile, do_ptr + wide * do_h, do_m, m0, seqlen_q,
                BLOCK_N, BLOCK_M, DV2, HEADDIM_V, TF32, MASKED, SAFE,
            )  # fmt: skip
            ds = _score_gradient(p, dp, delta[None, :], keep, upscale, visible, MASKED)
            ds = _before_softcap(ds, t, softcap, visible, MASKED)
            dk, dk2 = _accumulate(dk, dk2, ds, q_tile, q2_tile, visible, D2, TF32, SAFE)
    return dk, dk2, dv, dv2


@triton.jit
def _dk_store(
    dk, dk2, dk_ptr, dk_n, n0, seqlen_k, scale, HEADDIM: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr,
):  # fmt: skip
    dk_ptr += n0.to(tl.int64) * dk_n
    store_rows(dk_ptr, dk_n, seqlen_k - n0, dk * scale, BLOCK_N, D, 0, HEADDIM)
    if D2 > 0:
        store_rows(dk_ptr, dk_n, seqlen_k - n0, dk2 * scale, BLOCK_N, D2, D, HEADDIM)


@triton.jit
def _dv_store(
    dv, dv2, dv_ptr, dv_n, n0, seqlen_k, upscale, HEADDIM_V: tl.constexpr, BLOCK_N: tl.constexpr, DV: tl.constexpr,
    DV2: tl.constexpr,
):  # fmt: skip
    if upscale is not None:
        dv = dv * upscale
        dv2 = dv2 * upscale
    dv_ptr += n0.to(tl.int64) * dv_n
    store_rows(dv_ptr, dv_n, seqlen_k - n0, dv, BLOCK_N, DV, 0, HEADDIM_V)
    if DV2 > 0:
        store_rows(dv_ptr, dv_n, seqlen_k - n0, dv2, BLOCK_N, DV2, DV, HEADDIM_V)


@triton.jit
def _dkdv_again(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, q_m, q_h, k_n, v_n, do_m, do_h, dk_n, dv_n, lse_h,
    mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m, bias_n, slopes_ptr, philox_ptr, first_head, n0, n1,
    seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale,
    GROUP: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    BIAS_COLS: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """dk, dv of keys [n0, n1) once more, in few registers, such that 0 · NaN of a query that may not see a key is 0."""
    for step in tl.range(0, (n1 - n0 + LOST_M - 1) // LOST_M, num_stages=1):
        n = n0 + step * LOST_M
        k_tile, k2_tile = _load_block(k_ptr, k_n, n, seqlen_k, LOST_M, D, D2, HEADDIM, True)
        v_tile, v2_tile = _load_block(v_ptr, v_n, n, seqlen_k, LOST_M, DV, DV2, HEADDIM_V, True)
        lo, before, whole, after = query_range(
            n, tl.minimum(n + LOST_M, seqlen_k), diagonal, left, right, seqlen_q, LOST_N
        )
        dk, dk2 = _zeros(LOST_M, D, D2)
        dv, dv2 = _zeros(LOST_M, DV, DV2)
        for turn in tl.static_range(2):  # dv, then dk: one accumulator at a time
            dk, dk2, dv, dv2 = _dkdv_walk(
                dk, dk2, dv, dv2, k_tile, k2_tile, v_tile, v2_tile, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr,
                q_m, q_h, k_n, v_n, do_m, do_h, lse_h, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m,
                bias_n, slopes_ptr, philox_ptr, first_head, n, lo, before + whole + after, 0, 0, seqlen_q, seqlen_k,
                diagonal, left, right, scale, softcap, threshold, upscale, GROUP, MASK_ROWS, MASK_COLS, BIAS_ROWS,
                BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, LOST_N, LOST_M, D, D2, DV, DV2, TF32, True, True, turn == 1,
                turn == 0,
            )  # fmt: skip
            if turn == 0:
                _dv_store(dv, dv2, dv_ptr, dv_n, n, seqlen_k, upscale, HEADDIM_V, LOST_M, DV, DV2)
            else:
                _dk_store(dk, dk2, dk_ptr, dk_n, n, seqlen_k, scale, HEADDIM, LOST_M, D, D2)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "blocks_n", "lse_stride", "left", "right", "threshold"])
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr,
    cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m, do_h,
    mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads_k, seqlen_q, seqlen_k, blocks_n, lse_stride, left, right, scale, softcap, threshold, upscale,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head of k and v: a walk over the queries of all heads that read it.

    Grid: blocks_n · nheads_k · batch; with a right edge the first keys have the longest walk. Registers: dk, dv
    [BLOCK_N, headdim], s and dp transposed [BLOCK_N, BLOCK_M] in float32; shared memory: k, v, and num_stages tiles of
    q and do. Bound by the tensor cores: 8 · headdim flops per pair.
    """
    pid = tl.program_id(0)
    n0 = pid % blocks_n * BLOCK_N
    hk = pid // blocks_n % nheads_k
    b = pid // blocks_n // nheads_k
    h = hk * GROUP
    nheads = nheads_k * GROUP
    row = b.to(tl.int64)
    q_ptr += h.to(tl.int64) * q_h
    do_ptr += h.to(tl.int64) * do_h
    k_ptr += hk.to(tl.int64) * k_h
    v_ptr += hk.to(tl.int64) * v_h
    if cu_q_ptr is None:
        q_ptr += row * q_b
        do_ptr += row * do_b
        k_ptr += row * k_b
        v_ptr += row * v_b
        first_row = row * seqlen_k
        first_lse = (row * nheads + h) * lse_stride
    else:
        start_q = tl.load(cu_q_ptr + b)
        start_k = tl.load(cu_k_ptr + b)
        seqlen_q = tl.load(cu_q_ptr + b + 1) - start_q
        seqlen_k = tl.load(cu_k_ptr + b + 1) - start_k
        if n0 >= seqlen_k:
            return
        q_ptr += start_q.to(tl.int64) * q_m
        do_ptr += start_q.to(tl.int64) * do_m
        k_ptr += start_k.to(tl.int64) * k_n
        v_ptr += start_k.to(tl.int64) * v_n
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

    k_tile, k2_tile = _load_block(k_ptr, k_n, n0, seqlen_k, BLOCK_N, D, D2, HEADDIM, True)
    v_tile, v2_tile = _load_block(v_ptr, v_n, n0, seqlen_k, BLOCK_N, DV, DV2, HEADDIM_V, True)
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
    dk, dk2 = _zeros(BLOCK_N, D, D2)
    dv, dv2 = _zeros(BLOCK_N, DV, DV2)
    if MASKED:
        dk, dk2, dv, dv2 = _dkdv_walk(
            dk, dk2, dv, dv2, k_tile, k2_tile, v_tile, v2_tile, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, q_m,
            q_h, k_n, v_n, do_m, do_h, lse_stride, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m, bias_n,
            slopes_ptr, philox_ptr, head, n0, lo, before + after, before, whole * BLOCK_M, seqlen_q, seqlen_k,
            diagonal, left, right, scale, softcap, threshold, upscale, GROUP, MASK_ROWS, MASK_COLS, BIAS_ROWS,
            BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2, TF32, True, False, True, True,
        )  # fmt: skip
    if WHOLE:
        dk, dk2, dv, dv2 = _dkdv_walk(
            dk, dk2, dv, dv2, k_tile, k2_tile, v_tile, v2_tile, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, q_m,
            q_h, k_n, v_n, do_m, do_h, lse_stride, None, mask_h, mask_m, mask_n, None, bias_h, bias_m, bias_n,
            slopes_ptr, philox_ptr, head, n0, lo + before * BLOCK_M, whole, 0, 0, seqlen_q, seqlen_k, diagonal, left,
            right, scale, softcap, threshold, upscale, GROUP, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM,
            HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2, TF32, False, False, True, True,
        )  # fmt: skip
    lost = False
    if MASKED:
        lost = any_lost(dk) | any_lost(dv)
        if D2 > 0:
            lost = lost | any_lost(dk2)
        if DV2 > 0:
            lost = lost | any_lost(dv2)
    if lost:
        _dkdv_again(
            q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, q_m, q_h, k_n, v_n, do_m, do_h, dk_n, dv_n,
            lse_stride, mask_ptr, mask_h, mask_m, mask_n, bias_ptr, bias_h, bias_m, bias_n, slopes_ptr, philox_ptr,
            head, n0, n1, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale, GROUP,
            MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, D, D2, DV, DV2, TF32,
        )  # fmt: skip
    else:
        _dk_store(dk, dk2, dk_ptr, dk_n, n0, seqlen_k, scale, HEADDIM, BLOCK_N, D, D2)
        _dv_store(dv, dv2, dv_ptr, dv_n, n0, seqlen_k, upscale, HEADDIM_V, BLOCK_N, DV, DV2)
