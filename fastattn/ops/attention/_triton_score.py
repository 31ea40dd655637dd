"""What the Triton kernels share: a tile's scores, who sees whom, dropout, and loads, products and casts of tiles.

A tile lies either as [queries, keys] or transposed. Callers pass the indices m of the queries and n of the keys already
shaped for it ([BLOCK_M, 1] and [1, BLOCK_N], or [1, BLOCK_M] and [BLOCK_N, 1]), so every verb serves both.

Scores are kept in units of log 2, because the GPU's exponential is 2 ** x. Where nothing is added to scale · q k
(`FOLD`), they stay raw instead and the caller multiplies by `scale · log2 e` in the same instruction that subtracts.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOST_M, LOST_N = tl.constexpr(16), tl.constexpr(16)  # tiles of the slow road for numbers that are not finite


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """acc + a b, in float32."""
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def load_rows(
    ptr, stride, limit, ROWS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, HEADDIM: tl.constexpr,
    CHECK: tl.constexpr, zero=0,
):  # fmt: skip
    """Columns [FIRST, FIRST + D) of ROWS rows from ptr on, 0 beyond HEADDIM and, with CHECK, from row `limit` on.

    zero: 0, of `still_zero` where the addresses shall not be kept.
    """
    row = tl.arange(0, ROWS) + zero * 16  # 16: what is known of a row's divisors is known of the sum's
    d = FIRST + tl.arange(0, D)
    cells = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    if FIRST + D > HEADDIM:
        inside = (d < HEADDIM)[None, :]
        if CHECK:
            inside = inside & (row < limit)[:, None]
        return tl.load(cells, mask=inside, other=0.0)
    elif CHECK:
        return tl.load(cells, mask=(row < limit)[:, None], other=0.0)
    else:
        return tl.load(cells)


@triton.jit
def load_slice(
    ptr, stride, first, limit, d0, ROWS: tl.constexpr, SLICE: tl.constexpr, HEADDIM: tl.constexpr, CHECK: tl.constexpr,
    zero=0,
):  # fmt: skip
    """Columns [d0, d0 + SLICE) of ROWS rows from row `first` on, 0 and zero as in load_rows."""
    row = first + (tl.arange(0, ROWS) + zero * 16)
    d = d0 + tl.arange(0, SLICE)
    cells = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    if (SLICE - 1) & HEADDIM:  # a power of two that does not divide it
        inside = (d < HEADDIM)[None, :]
        if CHECK:
            inside = inside & (row < limit)[:, None]
        return tl.load(cells, mask=inside, other=0.0)
    elif CHECK:
        return tl.load(cells, mask=(row < limit)[:, None], other=0.0)
    else:
        return tl.load(cells)


@triton.jit
def dot_rows(
    a, a2, a_ptr, a_stride, a_first, a_limit, b, b2, b_ptr, b_stride, b_first, b_limit, M: tl.constexpr,
    N: tl.constexpr, D2: tl.constexpr, HEADDIM: tl.constexpr, TF32: tl.constexpr, CHECK: tl.constexpr,
    SMALL: tl.constexpr, zero=0,
):  # fmt: skip
    """a bᵀ of two-part rows: [M, N]. CHECK: rows of b may lie beyond b_limit, as rows of a may in any case.

    SMALL: in few registers. Then, and for long rows without tensor cores, where a thread would keep whole rows in
    registers (for a whole loop those that do not change in it), slices of the rows are read anew through the caches.
    """
    s = tl.zeros((M, N), tl.float32)
    if SMALL or (a.dtype == tl.float32 and not TF32 and (a.shape[1] > 64 or D2 > 0)):
        SLICE: tl.constexpr = min(a.shape[1], 64)
        for d0 in tl.range(0, HEADDIM, SLICE, num_stages=1):
            a_slice = load_slice(a_ptr, a_stride, a_first, a_limit, d0, M, SLICE, HEADDIM, True, zero)
            b_slice = load_slice(b_ptr, b_stride, b_first, b_limit, d0, N, SLICE, HEADDIM, CHECK, zero)
            s = dot(a_slice, tl.trans(b_slice), s, TF32)
    else:
        s = dot(a, tl.trans(b), s, TF32)
        if D2 > 0:
            s = dot(a2, tl.trans(b2), s, TF32)
    return s


@triton.jit
def store_rows(
    ptr, stride, limit, x, ROWS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, HEADDIM: tl.constexpr, zero=0
):  # fmt: skip
    """The counterpart of load_rows, rounding x to the type of ptr."""
    row = tl.arange(0, ROWS) + zero * 16
    d = FIRST + tl.arange(0, D)
    inside = (row < limit)[:, None]
    if FIRST + D > HEADDIM:
        inside = inside & (d < HEADDIM)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_pairs(
    ptr, stride_m, stride_n, m0, n0, i, j, seqlen_q, seqlen_k, ROWS: tl.constexpr, COLS: tl.constexpr, CHECK: tl.constexpr
):  # fmt: skip
    """The tile of a mask or bias whose first pair is (m0, n0); i and j count from there. Broadcast sides are read once."""
    tile = ptr
    if ROWS:
        tile = tile + m0.to(tl.int64) * stride_m
    if COLS:
        tile = tile + n0.to(tl.int64) * stride_n
    if ROWS and COLS:
        cells = (tile + i.to(tl.int64) * stride_m) + j.to(tl.int64) * stride_n
        if CHECK:
            return tl.load(cells, mask=(m0 + i < seqlen_q) & (n0 + j < seqlen_k), other=0)
        else:
            return tl.load(cells)
    elif ROWS:
        return tl.load(tile + i.to(tl.int64) * stride_m, mask=m0 + i < seqlen_q, other=0)
    elif COLS:
        return tl.load(tile + j.to(tl.int64) * stride_n, mask=n0 + j < seqlen_k, other=0)
    else:
        return tl.load(tile + (i * 0 + j * 0))


@triton.jit
def still_zero(zero, position):
    """0 once more, but the compiler cannot know: what contains it is computed where it is used.

    A tile's rows have the same addresses in every step and in both walks, two registers each. Kept through a walk that
    has no registers to spare, they spill; so the loops carry a 0 from step to step, and addresses contain it
    (`Tile.ANEW`).
    """
    return tl.minimum(zero, position)


@triton.jit
def head_of(ptr, stride_b, stride_row, stride_h, b, h, cu_ptr):
    """Row 0 of head h in sequence b; packed sequences begin at the rows of cu_ptr."""
    ptr += h.to(tl.int64) * stride_h
    if cu_ptr is None:
        ptr += b.to(tl.int64) * stride_b
    else:
        ptr += tl.load(cu_ptr + b).to(tl.int64) * stride_row
    return ptr


@triton.jit
def key_range(m0, m1, diagonal, left, right, seqlen_k, BLOCK_N: tl.constexpr):
    """The tiles of keys that queries [m0, m1) see, diagonal being the key that query 0 is aligned with.

    lo, then the number of masked tiles before the whole ones, of whole tiles, and of masked tiles after them.
    """
    lo = 0
    hi = seqlen_k
    whole_lo = 0
    whole_hi = seqlen_k
    if right is not None:
        hi = tl.minimum(hi, m1 + diagonal + right)
        whole_hi = tl.minimum(whole_hi, m0 + diagonal + right + 1)
    if left is not None:
        lo = tl.maximum(lo, m0 + diagonal - left) // BLOCK_N * BLOCK_N
        whole_lo = tl.maximum(whole_lo, m1 - 1 + diagonal - left)
    tiles = tl.maximum(hi - lo + BLOCK_N - 1, 0) // BLOCK_N
    before = tl.minimum(tl.maximum(whole_lo - lo + BLOCK_N - 1, 0) // BLOCK_N, tiles)
    whole = tl.minimum(tl.maximum(whole_hi - lo, 0) // BLOCK_N - before, tiles - before)
    whole = tl.maximum(whole, 0)
    return lo, before, whole, tiles - before - whole


@triton.jit
def query_range(n0, n1, diagonal, left, right, seqlen_q, BLOCK_M: tl.constexpr):
    """The tiles of queries that see keys [n0, n1): as key_range, with the sides exchanged."""
    lo = 0
    hi = seqlen_q
    whole_lo = 0
    whole_hi = seqlen_q
    if right is not None:
        lo = tl.maximum(lo, n0 - diagonal - right) // BLOCK_M * BLOCK_M
        whole_lo = tl.maximum(whole_lo, n1 - 1 - diagonal - right)
    if left is not None:
        hi = tl.minimum(hi, n1 - diagonal + left)
        whole_hi = tl.minimum(whole_hi, n0 - diagonal + left + 1)
    tiles = tl.maximum(hi - lo + BLOCK_M - 1, 0) // BLOCK_M
    before = tl.minimum(tl.maximum(whole_lo - lo + BLOCK_M - 1, 0) // BLOCK_M, tiles)
    whole = tl.minimum(tl.maximum(whole_hi - lo, 0) // BLOCK_M - before, tiles - before)
    whole = tl.maximum(whole, 0)
    return lo, before, whole, tiles - before - whole


@triton.jit
def _mask_is_empty(
    ptr, stride_h, stride_m, stride_n, m0, n0, i, j, seqlen_q, seqlen_k, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Does a tile of the boolean mask hide every pair, for all heads of the group?"""
    found = 0
    for _ in range(0, GROUP):
        seen = load_pairs(ptr, stride_m, stride_n, m0, n0, i, j, seqlen_q, seqlen_k, ROWS, COLS, True) != 0
        found += tl.max(seen.to(tl.int32))
        ptr += stride_h
    return found == 0


@triton.jit
def seen_range(
    ptr, stride_h, stride_m, stride_n, m0, n0, step_m, step_n, count, i, j, seqlen_q, seqlen_k, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(how many of `count` tiles the mask hides before the first that it does not hide, how many are left up to the last).

    The tiles start at (m0, n0), (m0 + step_m, n0 + step_n), ... The walk stays free of branches, so that its loads can
    run ahead; a mask that is causal, padded or block diagonal still costs its visible tiles only.
    """
    skipped = 0
    empty = count > 0
    while empty:
        empty = _mask_is_empty(
            ptr, stride_h, stride_m, stride_n, m0 + skipped * step_m, n0 + skipped * step_n, i, j, seqlen_q, seqlen_k,
            GROUP, ROWS, COLS,
        )  # fmt: skip
        skipped += empty.to(tl.int32)
        empty = empty & (skipped < count)
    end = count
    empty = end > skipped
    while empty:
        empty = _mask_is_empty(
            ptr, stride_h, stride_m, stride_n, m0 + (end - 1) * step_m, n0 + (end - 1) * step_n, i, j, seqlen_q,
            seqlen_k, GROUP, ROWS, COLS,
        )  # fmt: skip
        end -= empty.to(tl.int32)
        empty = empty & (end > skipped)
    return skipped, end - skipped


@triton.jit
def band(m, n, diagonal, left, right, seqlen_q, seqlen_k):
    """bool: pair (m, n) exists and lies inside the band."""
    visible = (m < seqlen_q) & (n < seqlen_k)
    if right is not None:
        visible = visible & (n <= m + diagonal + right)
    if left is not None:
        visible = visible & (n >= m + diagonal - left)
    return visible


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """1 - 2 / (1 + exp 2x); with EXACT a series near 0, where that would cancel."""
    size = tl.abs(x)
    y = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2E)))
    y = tl.where(x < 0, -y, y)
    if EXACT:
        z = x * x
        series = -1382.0 / 155925.0 * z + 62.0 / 2835.0
        series = series * z - 17.0 / 315.0
        series = series * z + 2.0 / 15.0
        series = series * z - 1.0 / 3.0
        y = tl.where(size < 0.25, x + x * z * series, y)
    return y


@triton.jit
def score(
    s, distance, slope, bias, scale, softcap, FOLD: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr = LOG2E
):
    """(the score times UNIT, tanh of the softcap) of raw products s; with FOLD s itself.

    distance  |m + diagonal - n|, needed with slope (ALiBi)
    UNIT      log2 e for exp2; 1 where a difference of large scores is taken first, so that less is rounded
    """
    t = s
    if not FOLD:
        if softcap is not None:
            t = tanh(s * (scale / softcap), EXACT)
            s = t * (softcap * UNIT)
        else:
            s = s * (scale * UNIT)
        if slope is not None:
            s = s - (slope * UNIT) * distance
        if bias is not None:
            s = s + bias.to(tl.float32) * UNIT
    return s, t


@triton.jit
def kept(
    philox_ptr, head, m0, n0, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Which pairs of a tile survive dropout: bool [BLOCK_M, BLOCK_N] or its transpose. One Philox call per four keys."""
    m = (m0 + tl.arange(0, BLOCK_M)).to(tl.uint32)
    n4 = (n0 // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    if TRANSPOSED:
        m = m[None, :]
        n4 = n4[:, None]
    else:
        m = m[:, None]
        n4 = n4[None, :]
    zero = m * 0 + n4 * 0
    seed = tl.load(philox_ptr)
    offset = (tl.load(philox_ptr + 1) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + n4, zero + m, zero + head.to(tl.uint32), zero + offset)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., a, b] is word 2a + b
    if TRANSPOSED:
        words = words.permute(0, 2, 3, 1).reshape(BLOCK_N, BLOCK_M)
    else:
        words = words.reshape(BLOCK_M, BLOCK_N)
    return words >= threshold.to(tl.uint32)


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def any_lost(x):
    """Is any number of a tile NaN or infinite?"""
    return tl.max(tl.where(is_finite(x), 0, 1)) != 0


@triton.jit
def dot_seen(weights, x, acc, seen, TF32: tl.constexpr):
    """acc + weights x, where row k of x counts only for rows i with seen[i, k], even if it holds NaN or infinity.

    Those are taken out of x and counted by a second product: +inf as 1 / 256, -inf as 1, NaN as 256, each at most 255
    times, which the low types hold without rounding.
    """
    wide = x.to(tl.float32)
    clean = tl.where(is_finite(x), wide, 0.0).to(x.dtype)
    acc = dot(weights, clean, acc, TF32)
    code = tl.where(wide != wide, 256.0, tl.where(is_finite(x), 0.0, tl.where(wide > 0, 1.0 / 256.0, 1.0)))
    count = dot(seen.to(tl.float32).to(x.dtype), code.to(x.dtype), tl.zeros_like(acc), TF32)
    nans = tl.floor(count * (1.0 / 256.0))
    below = count - nans * 256.0
    minus = tl.floor(below)
    acc = tl.where(below > minus, acc + float("inf"), acc)
    acc = tl.where(minus > 0, acc - float("inf"), acc)
    return tl.where(nans > 0, float("nan"), acc)
