"""Gradients of what many queries share: a bias that broadcasts, and sinks. Sums run in a fixed order, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention._triton_bwd import load_block, probabilities, score_gradient
from fastattn.ops.attention._triton_score import LOG2E, dot_rows, kept, load_pairs


@triton.jit(
    do_not_specialize=["seqlen_q", "seqlen_k", "blocks_m", "blocks_n", "lse_stride", "left", "right", "threshold"]
)
def attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dbias_ptr, mask_ptr, bias_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr,
    philox_ptr,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_m, do_h, dbias_b, dbias_h, dbias_m, dbias_n,
    mask_b, mask_h, mask_m, mask_n, bias_b, bias_h, bias_m, bias_n,
    slopes_b, nheads, seqlen_q, seqlen_k, blocks_m, blocks_n, lse_stride, owned_b, owned_h, batch,
    left, right, scale, softcap, threshold, upscale,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, UPPER_LEFT: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
    TF32: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a bias that broadcasts: dS summed over every pair that read this part of the bias.

    Grid: tiles of the bias · owned_h · owned_b, the heads and sequences that the output tells apart; the program walks
    over the others, and over the rows or columns that the bias does not have. Registers: three float32 tiles. Bound by
    the tensor cores: 4 · headdim flops per pair.
    """
    pid = tl.program_id(0)
    tiles_m = blocks_m if BIAS_ROWS else 1
    tiles_n = blocks_n if BIAS_COLS else 1
    at_n = pid % tiles_n
    at_m = pid // tiles_n % tiles_m
    at_h = pid // tiles_n // tiles_m % owned_h
    at_b = pid // tiles_n // tiles_m // owned_h
    steps_m = 1 if BIAS_ROWS else blocks_m
    steps_n = 1 if BIAS_COLS else blocks_n
    steps_h = nheads // owned_h
    steps_b = batch // owned_b
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, steps_b * steps_h * steps_m * steps_n, num_stages=1):
        n0 = (at_n + step % steps_n) * BLOCK_N
        m0 = (at_m + step // steps_n % steps_m) * BLOCK_M
        h = at_h + step // steps_n // steps_m % steps_h
        b = at_b + step // steps_n // steps_m // steps_h
        row = b.to(tl.int64)
        wide_h = h.to(tl.int64)
        rows, cols = seqlen_q, seqlen_k
        q = q_ptr + row * q_b + wide_h * q_h
        do = do_ptr + row * do_b + wide_h * do_h
        k = k_ptr + row * k_b + (h // GROUP).to(tl.int64) * k_h
        v = v_ptr + row * v_b + (h // GROUP).to(tl.int64) * v_h
        lse_at = (row * nheads + h) * lse_stride
        if cu_q_ptr is not None:
            start_q = tl.load(cu_q_ptr + b)
            start_k = tl.load(cu_k_ptr + b)
            rows = tl.load(cu_q_ptr + b + 1) - start_q
            cols = tl.load(cu_k_ptr + b + 1) - start_k
            q += start_q.to(tl.int64) * q_m
            do += start_q.to(tl.int64) * do_m
            k += start_k.to(tl.int64) * k_n
            v += start_k.to(tl.int64) * v_n
            lse_at = wide_h * lse_stride + start_q
        diagonal = cols * 0 if UPPER_LEFT else cols - rows
        wanted = (m0 < rows) & (n0 < cols)
        if right is not None:
            wanted = wanted & (n0 <= m0 + BLOCK_M - 1 + diagonal + right)
        if left is not None:
            wanted = wanted & (n0 + BLOCK_N - 1 >= m0 + diagonal - left)
        if wanted:
            m = (m0 + i)[:, None]
            n = (n0 + j)[None, :]
            q_tile, q2_tile = load_block(q, q_m, m0, rows, BLOCK_M, D, D2, HEADDIM, True)
            k_tile, k2_tile = load_block(k, k_n, n0, cols, BLOCK_N, D, D2, HEADDIM, True)
            s = dot_rows(
                q_tile, q2_tile, q, q_m, m0, rows, k_tile, k2_tile, k, k_n, n0, cols, BLOCK_M, BLOCK_N, D2, HEADDIM,
                TF32, True, False,
            )  # fmt: skip
            bias = load_pairs(
                bias_ptr + row * bias_b + wide_h * bias_h, bias_m, bias_n, m0, n0, i[:, None], j[None, :], rows, cols,
                BIAS_ROWS, BIAS_COLS, True,
            )  # fmt: skip
            seen = None
            if mask_ptr is not None:
                seen = load_pairs(
                    mask_ptr + row * mask_b + wide_h * mask_h, mask_m, mask_n, m0, n0, i[:, None], j[None, :], rows,
                    cols, MASK_ROWS, MASK_COLS, True,
                )  # fmt: skip
                seen = seen != 0
            slope = None
            if slopes_ptr is not None:
                slope = tl.load(slopes_ptr + row * slopes_b + h)
            lse = tl.load(lse_ptr + lse_at + m0 + i, mask=m0 + i < rows, other=0.0)
            delta = tl.load(delta_ptr + lse_at + m0 + i, mask=m0 + i < rows, other=0.0)
            p, _, visible = probabilities(
                s, lse[:, None], m, n, seen, bias, slope, rows, cols, diagonal, left, right, scale, softcap, False,
                q_tile.dtype == tl.float32, True,
            )  # fmt: skip
            do_tile, do2_tile = load_block(do, do_m, m0, rows, BLOCK_M, DV, DV2, HEADDIM_V, True)
            v_tile, v2_tile = load_block(v, v_n, n0, cols, BLOCK_N, DV, DV2, HEADDIM_V, True)
            dp = dot_rows(
                do_tile, do2_tile, do, do_m, m0, rows, v_tile, v2_tile, v, v_n, n0, cols, BLOCK_M, BLOCK_N, DV2,
                HEADDIM_V, TF32, True, False,
            )  # fmt: skip
            keep = None
            if philox_ptr is not None:
                keep = kept(philox_ptr, b * nheads + h, m0, n0, threshold, BLOCK_M, BLOCK_N, False)
            total += score_gradient(p, dp, delta[:, None], keep, upscale, visible, True)
    dbias_ptr += at_b.to(tl.int64) * dbias_b + at_h.to(tl.int64) * dbias_h
    m = at_m * BLOCK_M + i
    n = at_n * BLOCK_N + j
    if BIAS_ROWS and BIAS_COLS:
        cells = (dbias_ptr + m.to(tl.int64)[:, None] * dbias_m) + n[None, :]
        tl.store(cells, total, mask=(m < seqlen_q)[:, None] & (n < seqlen_k)[None, :])
    elif BIAS_ROWS:
        tl.store(dbias_ptr + m.to(tl.int64) * dbias_m, tl.sum(total, axis=1), mask=m < seqlen_q)
    elif BIAS_COLS:
        tl.store(dbias_ptr + n.to(tl.int64) * dbias_n, tl.sum(total, axis=0), mask=n < seqlen_k)
    else:
        tl.store(dbias_ptr, tl.sum(total))


@triton.jit(do_not_specialize=["seqlen_q", "batch"])
def attention_bwd_dsinks_kernel(
    lse_ptr, delta_ptr, sinks_ptr, dsinks_ptr, nheads, seqlen_q, batch, BLOCK_M: tl.constexpr
):  # fmt: skip
    """dsinks = -sum of exp(sink - lse) · delta over all queries of one head.

    Grid: nheads. Bound by memory: lse and delta are read once. A packed call is one sequence here.
    """
    h = tl.program_id(0)
    sink = tl.load(sinks_ptr + h).to(tl.float32)
    i = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    blocks = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    for step in range(0, batch * blocks):
        m = step % blocks * BLOCK_M + i
        at = ((step // blocks) * nheads + h).to(tl.int64) * seqlen_q + m
        lse = tl.load(lse_ptr + at, mask=m < seqlen_q, other=0.0)
        delta = tl.load(delta_ptr + at, mask=m < seqlen_q, other=0.0)
        share = tl.exp2((sink - lse) * LOG2E)
        total -= tl.where(lse == float("-inf"), 0.0, share * delta)
    tl.store(dsinks_ptr + h, tl.sum(total, axis=0))
