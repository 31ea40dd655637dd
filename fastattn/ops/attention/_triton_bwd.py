"""What the backward kernels share. README.md derives them: dS = P (dP - delta), dq = scale dS k, dk = scale dSᵀ q, dv = Pᵀ do.

Every gradient is owned by one program that adds up its terms in a fixed order: dq by a block of queries, dk and dv by a
block of keys, which walks over all query heads of its group. So there are no atomics, and equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention._triton_score import LOG2E, band, dot, dot_seen, load_rows, score


@triton.jit(do_not_specialize=["seqlen_q"])
def attention_bwd_delta_kernel(
    do_ptr, o_ptr, dlse_ptr, delta_ptr, do_b, do_m, do_h, o_b, o_m, o_h, nheads, seqlen_q,
    HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do ∘ o) - dlse for BLOCK_M queries of one head.

    Grid: cdiv(seqlen_q, BLOCK_M) · nheads · batch, in one axis, for only the first goes beyond 65535; a packed call is one
    sequence here. Bound by memory: do and o once.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    m0 = pid % blocks * BLOCK_M
    head = pid // blocks
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
def probabilities(
    s, lse, m, n, seen, bias, slope, seqlen_q, seqlen_k, diagonal, left, right, scale, softcap, FOLD: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P of a tile of raw products, tanh of the softcap, and (with MASKED) which pairs are visible."""
    distance = None
    if slope is not None:
        distance = tl.abs((m + diagonal - n).to(tl.float32))
    s, t = score(s, distance, slope, bias, scale, softcap, FOLD, EXACT, 1.0 if EXACT else LOG2E)
    if EXACT:  # the difference before the factor, as plain PyTorch has it: one rounding of large numbers less
        p = tl.exp2(((s * scale if FOLD else s) - lse) * LOG2E)
    elif FOLD:
        p = tl.exp2(s * (scale * LOG2E) - lse * LOG2E)
    else:
        p = tl.exp2(s - lse * LOG2E)
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
def score_gradient(p, dp, delta, keep, upscale, visible, MASKED: tl.constexpr):
    """P (dP - delta), the gradient of the scores after softcap, ALiBi and bias."""
    if keep is not None:
        dp = tl.where(keep, dp * upscale, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    return ds


@triton.jit
def before_softcap(ds, t, softcap, visible, MASKED: tl.constexpr):
    if softcap is not None:
        ds = ds * (1.0 - t * t)
        if MASKED:
            ds = tl.where(visible, ds, 0.0)
    return ds


@triton.jit
def load_block(
    ptr, stride, first, limit, ROWS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, HEADDIM: tl.constexpr,
    CHECK: tl.constexpr, zero=0,
):  # fmt: skip
    """The two parts of ROWS rows from row `first` on; without a second part, the first twice. zero: as in load_rows."""
    ptr += first.to(tl.int64) * stride
    x = load_rows(ptr, stride, limit - first, ROWS, D, 0, HEADDIM, CHECK, zero)
    x2 = x
    if D2 > 0:
        x2 = load_rows(ptr, stride, limit - first, ROWS, D2, D, HEADDIM, CHECK, zero)
    return x, x2


@triton.jit
def accumulate(acc, acc2, w, x, x2, seen, D2: tl.constexpr, TF32: tl.constexpr, SAFE: tl.constexpr):
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
def zero_block(ROWS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr):
    return tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D2 if D2 > 0 else 1), tl.float32)
