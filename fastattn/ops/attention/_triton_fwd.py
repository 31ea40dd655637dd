"""The forward kernels: attention with online softmax, and the probabilities for those who must look at them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention._triton_score import (
    LN2,
    LOG2E,
    LOST_M,
    LOST_N,
    any_lost,
    band,
    dot,
    dot_rows,
    dot_seen,
    head_of,
    kept,
    key_range,
    load_pairs,
    load_rows,
    score,
    seen_range,
    still_zero,
    store_rows,
)


@triton.jit
def _start(sink, BLOCK_M: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr):
    """acc, acc2, top, total before the first key; a sink is a key without a value."""
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    acc2 = tl.zeros((BLOCK_M, DV2 if DV2 > 0 else 1), tl.float32)
    if sink is None:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    else:
        top = tl.zeros((BLOCK_M,), tl.float32) + sink
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    return acc, acc2, top, total


@triton.jit
def _tile(
    acc, acc2, top, total, q_tile, q2_tile, q_ptr, k_ptr, v_ptr, q_m, k_n, v_n, seen, bias_ptr, bias_m, bias_n, slope,
    philox_ptr, head, m0, n0, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr, MASKED: tl.constexpr, SAFE: tl.constexpr,
    zero=0,
):  # fmt: skip
    """One step of the online softmax. seen: the tile of the boolean mask, None without one."""
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    k_tile = load_rows(k_ptr, k_n, seqlen_k - n0, BLOCK_N, D, 0, HEADDIM, MASKED, zero)
    k2_tile = k_tile
    if D2 > 0:
        k2_tile = load_rows(k_ptr, k_n, seqlen_k - n0, BLOCK_N, D2, D, HEADDIM, MASKED, zero)
    s = dot_rows(
        q_tile, q2_tile, q_ptr, q_m, m0, seqlen_q, k_tile, k2_tile, k_ptr, k_n, 0, seqlen_k - n0, BLOCK_M, BLOCK_N, D2,
        HEADDIM, TF32, MASKED, SAFE, zero,
    )  # fmt: skip
    bias = None
    if bias_ptr is not None:
        bias = load_pairs(bias_ptr, bias_m, bias_n, m0, n0, i, j, seqlen_q, seqlen_k, BIAS_ROWS, BIAS_COLS, MASKED)
    distance = None
    if slope is not None:
        distance = tl.abs((m0 + i + diagonal - n0 - j).to(tl.float32))
    s, _ = score(s, distance, slope, bias, scale, softcap, FOLD, q_tile.dtype == tl.float32)
    if MASKED:
        visible = band(m0 + i, n0 + j, diagonal, left, right, seqlen_q, seqlen_k)
        if seen is not None:
            visible = visible & seen
        if bias is not None:
            visible = visible & (bias != float("-inf"))
        s = tl.where(visible, s, float("-inf"))
    factor = scale * LOG2E if FOLD else 1.0
    raised = tl.maximum(top, tl.max(s, axis=1) * factor)
    shift = tl.where(raised == float("-inf"), 0.0, raised) if MASKED else raised
    p = tl.exp2(s * factor - shift[:, None])  # [BLOCK_M, BLOCK_N]
    kept_share = tl.exp2(top - shift)
    total = total * kept_share + tl.sum(p, axis=1)
    if philox_ptr is not None:
        p = tl.where(kept(philox_ptr, head, m0, n0, threshold, BLOCK_M, BLOCK_N, False), p, 0.0)
    p = p.to(v_ptr.dtype.element_ty)
    acc = acc * kept_share[:, None]
    v_tile = load_rows(v_ptr, v_n, seqlen_k - n0, BLOCK_N, DV, 0, HEADDIM_V, MASKED, zero)
    if SAFE:
        acc = dot_seen(p, v_tile, acc, visible, TF32)
    else:
        acc = dot(p, v_tile, acc, TF32)
    if DV2 > 0:
        acc2 = acc2 * kept_share[:, None]
        v2_tile = load_rows(v_ptr, v_n, seqlen_k - n0, BLOCK_N, DV2, DV, HEADDIM_V, MASKED, zero)
        if SAFE:
            acc2 = dot_seen(p, v2_tile, acc2, visible, TF32)
        else:
            acc2 = dot(p, v2_tile, acc2, TF32)
    return acc, acc2, raised, total


@triton.jit
def _walk(
    acc, acc2, top, total, q_tile, q2_tile, q_ptr, k_ptr, v_ptr, q_m, k_n, v_n, mask_ptr, mask_m, mask_n, bias_ptr,
    bias_m, bias_n, slope, philox_ptr, head, m0, first, count, jump_at, jump, seqlen_q, seqlen_k, diagonal, left,
    right, scale, softcap, threshold,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr, MASKED: tl.constexpr,
    SAFE: tl.constexpr, ANEW: tl.constexpr = False, zero=0,
):  # fmt: skip
    """`count` tiles of keys from `first` on; masked ones leave out the `jump` keys after tile `jump_at`."""
    for step in tl.range(0, count, num_stages=1 if SAFE else None):
        n0 = first + step * BLOCK_N
        if MASKED:
            n0 += tl.where(step >= jump_at, jump, 0)
            if ANEW:
                zero = still_zero(zero, n0)
        k_tile_ptr = k_ptr + n0.to(tl.int64) * k_n
        v_tile_ptr = v_ptr + n0.to(tl.int64) * v_n
        seen = None
        if mask_ptr is not None:
            i = tl.arange(0, BLOCK_M)[:, None]
            j = tl.arange(0, BLOCK_N)[None, :]
            seen = load_pairs(mask_ptr, mask_m, mask_n, m0, n0, i, j, seqlen_q, seqlen_k, MASK_ROWS, MASK_COLS, True)
            seen = seen != 0
        acc, acc2, top, total = _tile(
            acc, acc2, top, total, q_tile, q2_tile, q_ptr, k_tile_ptr, v_tile_ptr, q_m, k_n, v_n, seen, bias_ptr,
            bias_m, bias_n, slope, philox_ptr, head, m0, n0, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap,
            threshold, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2, TF32, MASKED,
            SAFE, zero,
        )  # fmt: skip
    return acc, acc2, top, total, zero


@triton.jit
def _load_q(
    q_ptr, q_m, m0, seqlen_q, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, zero=0
):  # fmt: skip
    """The two parts of a block of queries; without a second part, the first twice."""
    q_ptr += m0.to(tl.int64) * q_m
    q_tile = load_rows(q_ptr, q_m, seqlen_q - m0, BLOCK_M, D, 0, HEADDIM, True, zero)
    q2_tile = q_tile
    if D2 > 0:
        q2_tile = load_rows(q_ptr, q_m, seqlen_q - m0, BLOCK_M, D2, D, HEADDIM, True, zero)
    return q_tile, q2_tile


@triton.jit
def _finish(
    acc, acc2, top, total, o_ptr, o_m, lse_ptr, m0, seqlen_q, upscale, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    DV: tl.constexpr, DV2: tl.constexpr, zero=0,
):  # fmt: skip
    """Normalise and store; a row without keys is o = 0, lse = -inf. upscale: 1 / (1 - dropout_p) or None."""
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    if upscale is not None:
        share = share * upscale
    o_ptr += m0.to(tl.int64) * o_m
    store_rows(o_ptr, o_m, seqlen_q - m0, acc * share[:, None], BLOCK_M, DV, 0, HEADDIM_V, zero)
    if DV2 > 0:
        store_rows(o_ptr, o_m, seqlen_q - m0, acc2 * share[:, None], BLOCK_M, DV2, DV, HEADDIM_V, zero)
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(tl.where(empty, 1.0, total)))
    i = tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + m0 + i, lse, mask=i < seqlen_q - m0)


@triton.jit
def _again(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_m, k_n, v_n, o_m, mask_ptr, mask_m, mask_n, bias_ptr, bias_m, bias_n, slope,
    sink, philox_ptr, head, m0, m1, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, upscale,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV2: tl.constexpr, TF32: tl.constexpr,
    ANEW: tl.constexpr, zero,
):  # fmt: skip
    """Queries [m0, m1) once more, in few registers, such that 0 · NaN of a value that a query may not see is 0."""
    for step in tl.range(0, (m1 - m0 + LOST_M - 1) // LOST_M, num_stages=1):
        m = m0 + step * LOST_M
        if ANEW:
            zero = still_zero(zero, m)
        q_tile, q2_tile = _load_q(q_ptr, q_m, m, seqlen_q, HEADDIM, LOST_M, D, D2, zero)
        lo, before, whole, after = key_range(
            m, tl.minimum(m + LOST_M, seqlen_q), diagonal, left, right, seqlen_k, LOST_N
        )
        acc, acc2, top, total = _start(sink, LOST_M, DV, DV2)
        acc, acc2, top, total, _ = _walk(
            acc, acc2, top, total, q_tile, q2_tile, q_ptr, k_ptr, v_ptr, q_m, k_n, v_n, mask_ptr, mask_m, mask_n,
            bias_ptr, bias_m, bias_n, slope, philox_ptr, head, m, lo, before + whole + after, 0, 0, seqlen_q, seqlen_k,
            diagonal, left, right, scale, softcap, threshold, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM,
            HEADDIM_V, FOLD, LOST_M, LOST_N, D, D2, DV, DV2, TF32, True, True, ANEW, zero,
        )  # fmt: skip
        _finish(acc, acc2, top, total, o_ptr, o_m, lse_ptr, m, seqlen_q, upscale, HEADDIM_V, LOST_M, DV, DV2, zero)


@triton.jit
def _block(
    work, works, zero,
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, mask_ptr, bias_ptr, slopes_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
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
    if cu_q_ptr is None:
        o_row = row * seqlen_q
        lse_ptr += (row * nheads + h) * lse_stride
    else:
        start_q = tl.load(cu_q_ptr + b)
        start_k = tl.load(cu_k_ptr + b)
        seqlen_q = tl.load(cu_q_ptr + b + 1) - start_q
        seqlen_k = tl.load(cu_k_ptr + b + 1) - start_k
        if works is not None:
            seqlen_k = tl.where(m0 < seqlen_q, seqlen_k, 0)  # a block beyond its sequence walks over nothing
        elif m0 >= seqlen_q:
            return
        o_row = start_q.to(tl.int64)
        lse_ptr += h.to(tl.int64) * lse_stride + o_row
    o_m = nheads * HEADDIM_V
    o_ptr += o_row * o_m + h * HEADDIM_V
    diagonal = 0 if UPPER_LEFT else seqlen_k - seqlen_q
    head = b * nheads + h
    if mask_ptr is not None:
        mask_ptr += row * mask_b + h.to(tl.int64) * mask_h
    if bias_ptr is not None:
        bias_ptr += row * bias_b + h.to(tl.int64) * bias_h
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + row * slopes_b + h)
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E

    m1 = tl.minimum(m0 + BLOCK_M, seqlen_q)
    q_tile, q2_tile = _load_q(q_head, q_m, m0, seqlen_q, HEADDIM, BLOCK_M, D, D2, zero)
    lo, before, whole, after = key_range(m0, m1, diagonal, left, right, seqlen_k, BLOCK_N)
    if not WHOLE:
        before, whole, after = before + whole + after, 0, 0
    if mask_ptr is not None:
        i = tl.arange(0, BLOCK_M)[:, None]
        j = tl.arange(0, BLOCK_N)[None, :]
        hidden, before = seen_range(
            mask_ptr, 0, mask_m, mask_n, m0, lo, 0, BLOCK_N, before, i, j, seqlen_q, seqlen_k, 1, MASK_ROWS, MASK_COLS
        )
        lo += hidden * BLOCK_N
    acc, acc2, top, total = _start(sink, BLOCK_M, DV, DV2)
    if MASKED:
        acc, acc2, top, total, zero = _walk(
            acc, acc2, top, total, q_tile, q2_tile, q_head, k_head, v_head, q_m, k_n, v_n, mask_ptr, mask_m, mask_n,
            bias_ptr, bias_m, bias_n, slope, philox_ptr, head, m0, lo, before + after, before, whole * BLOCK_N,
            seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, threshold, MASK_ROWS, MASK_COLS, BIAS_ROWS,
            BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2, TF32, True, False, ANEW, zero,
        )  # fmt: skip
    if WHOLE:
        acc, acc2, top, total, zero = _walk(
            acc, acc2, top, total, q_tile, q2_tile, q_head, k_head, v_head, q_m, k_n, v_n, None, mask_m, mask_n,
            bias_ptr, bias_m, bias_n, slope, philox_ptr, head, m0, lo + before * BLOCK_N, whole, 0, 0, seqlen_q,
            seqlen_k, diagonal, left, right, scale, softcap, threshold, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS,
            HEADDIM, HEADDIM_V, FOLD, BLOCK_M, BLOCK_N, D, D2, DV, DV2, TF32, False, False, ANEW, zero,
        )  # fmt: skip
    lost = False
    if MASKED:
        lost = any_lost(acc)
        if DV2 > 0:
            lost = lost | any_lost(acc2)
    if lost:
        if ANEW:
            q_head = head_of(q_ptr, q_b, q_m, q_h, b + zero, h + zero, cu_q_ptr)
            k_head = head_of(k_ptr, k_b, k_n, k_h, b + zero, (h + zero) // GROUP, cu_k_ptr)
            v_head = head_of(v_ptr, v_b, v_n, v_h, b + zero, (h + zero) // GROUP, cu_k_ptr)
        _again(
            q_head, k_head, v_head, o_ptr, lse_ptr, q_m, k_n, v_n, o_m, mask_ptr, mask_m, mask_n, bias_ptr, bias_m,
            bias_n, slope, sink, philox_ptr, head, m0, m1, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap,
            threshold, upscale, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, HEADDIM, HEADDIM_V, FOLD, D, D2, DV, DV2,
            TF32, ANEW, zero,
        )  # fmt: skip
    else:
        _finish(acc, acc2, top, total, o_ptr, o_m, lse_ptr, m0, seqlen_q, upscale, HEADDIM_V, BLOCK_M, DV, DV2, zero)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "blocks_m", "lse_stride", "left", "right", "threshold", "works"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, mask_ptr, bias_ptr, slopes_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride, left, right, scale, softcap, threshold, upscale, works,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, ANEW: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_M queries of one head: an online softmax over the tiles of keys they see.

    Grid: works = blocks_m · nheads · batch, or fewer programs that do several each; blocks of one head are neighbours,
    and so are the heads that share keys. With a right edge the longest blocks come first. Registers: acc
    [BLOCK_M, D + D2] and s [BLOCK_M, BLOCK_N] in float32; shared memory: q, and num_stages tiles of k and v. Bound by
    the tensor cores: 4 · headdim flops per pair.
    MASKED, WHOLE: whether there can be tiles that need a test for each pair, and tiles that need none.
    Dao, FlashAttention-2, arXiv:2307.08691.
    """
    zero = 0
    if works is None:
        _block(
            tl.program_id(0), works, zero, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, mask_ptr, bias_ptr, slopes_ptr,
            sinks_ptr, cu_q_ptr, cu_k_ptr, philox_ptr, q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, mask_h,
            mask_m, mask_n, bias_b, bias_h, bias_m, bias_n, slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride,
            left, right, scale, softcap, threshold, upscale, GROUP, HEADDIM, HEADDIM_V, UPPER_LEFT, FOLD, MASKED,
            WHOLE, ANEW, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, TF32, BLOCK_M, BLOCK_N, D, D2, DV, DV2,
        )  # fmt: skip
    else:
        for work in tl.range(tl.program_id(0), works, tl.num_programs(0), num_stages=1):
            zero = still_zero(zero, work)
            _block(
                work, works, zero, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, mask_ptr, bias_ptr, slopes_ptr, sinks_ptr,
                cu_q_ptr, cu_k_ptr, philox_ptr, q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, mask_h, mask_m,
                mask_n, bias_b, bias_h, bias_m, bias_n, slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, lse_stride,
                left, right, scale, softcap, threshold, upscale, GROUP, HEADDIM, HEADDIM_V, UPPER_LEFT, FOLD, MASKED,
                WHOLE, ANEW, MASK_ROWS, MASK_COLS, BIAS_ROWS, BIAS_COLS, TF32, BLOCK_M, BLOCK_N, D, D2, DV, DV2,
            )  # fmt: skip


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "blocks_m", "blocks_n", "left", "right"])
def attention_weights_kernel(
    q_ptr, k_ptr, lse_ptr, mask_ptr, bias_ptr, slopes_ptr, out_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, blocks_n, left, right, scale, softcap,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, UPPER_LEFT: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr, TF32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """One tile of P = exp(score - lse), 0 where a query may not look.

    Grid: blocks_n · blocks_m · nheads · batch. Registers: s [BLOCK_M, BLOCK_N] in float32. Bound by memory: the tile is
    written once.
    """
    pid = tl.program_id(0)
    n0 = pid % blocks_n * BLOCK_N
    m0 = pid // blocks_n % blocks_m * BLOCK_M
    head = pid // blocks_n // blocks_m
    h = head % nheads
    row = (head // nheads).to(tl.int64)
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    m = m0 + i
    n = n0 + j
    q_ptr += row * q_b + h.to(tl.int64) * q_h + m0.to(tl.int64) * q_m
    k_ptr += row * k_b + (h // GROUP).to(tl.int64) * k_h + n0.to(tl.int64) * k_n
    diagonal = 0 if UPPER_LEFT else seqlen_k - seqlen_q
    q_tile = load_rows(q_ptr, q_m, seqlen_q - m0, BLOCK_M, D, 0, HEADDIM, True)
    k_tile = load_rows(k_ptr, k_n, seqlen_k - n0, BLOCK_N, D, 0, HEADDIM, True)
    s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), TF32)
    if D2 > 0:
        q2_tile = load_rows(q_ptr, q_m, seqlen_q - m0, BLOCK_M, D2, D, HEADDIM, True)
        k2_tile = load_rows(k_ptr, k_n, seqlen_k - n0, BLOCK_N, D2, D, HEADDIM, True)
        s = dot(q2_tile, tl.trans(k2_tile), s, TF32)
    visible = band(m, n, diagonal, left, right, seqlen_q, seqlen_k)
    bias = None
    if bias_ptr is not None:
        bias_ptr += row * bias_b + h.to(tl.int64) * bias_h
        bias = load_pairs(bias_ptr, bias_m, bias_n, m0, n0, i, j, seqlen_q, seqlen_k, BIAS_ROWS, BIAS_COLS, True)
        visible = visible & (bias != float("-inf"))
    if mask_ptr is not None:
        mask_ptr += row * mask_b + h.to(tl.int64) * mask_h
        seen = load_pairs(mask_ptr, mask_m, mask_n, m0, n0, i, j, seqlen_q, seqlen_k, MASK_ROWS, MASK_COLS, True)
        visible = visible & (seen != 0)
    slope = None
    distance = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + row * slopes_b + h)
        distance = tl.abs((m + diagonal - n).to(tl.float32))
    s, _ = score(s, distance, slope, bias, scale, softcap, False, q_tile.dtype == tl.float32)
    rows = head.to(tl.int64) * seqlen_q + m
    lse = tl.load(lse_ptr + rows, mask=m < seqlen_q, other=0.0)
    p = tl.where(visible & (lse != float("-inf")), tl.exp2(s - lse * LOG2E), 0.0)
    tl.store(out_ptr + rows * seqlen_k + n, p.to(out_ptr.dtype.element_ty), mask=(m < seqlen_q) & (n < seqlen_k))
