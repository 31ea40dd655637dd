"""layer_norm and rms_norm in Triton: one set of kernels, CENTRED tells them apart.

Rows of up to `_WIDEST_FWD` (`_WIDEST_BWD`) columns are read once and stay in registers; longer ones are read a second
time, mostly out of the L2 cache. Gradients of weight and bias are summed without atomics: every program adds up the rows
it owns in a fixed order, and a second kernel adds up the programs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.ops._norm import Rows, rows_of, vector_gradient
from fastattn.runtime import launch

Tensor = torch.Tensor
_WIDEST_FWD = 32768
_WIDEST_BWD = 8192
_CHUNK = 8192
_STAGES = 2  # tiles of the backward in flight: with 3 some kernels spill, by analysis


@functools.lru_cache(4096)
def _plan(cols: int, rows: int, sms: int, per_warp: int) -> tuple[int, int, int]:
    """BLOCK_N, rows per program and warps, by analysis: every thread holds `per_warp` / 32 elements of a tile.

    Short rows share a program so that it has enough bytes in flight, unless there are too few rows for all the
    multiprocessors.
    """
    block = launch.next_power_of_2(max(cols, 16))
    warps = min(32, max(4, block // per_warp))
    share = max(1, 4 * per_warp // block)
    while share > 1 and rows < 2 * sms * share:
        share //= 2
    return block, share, warps


@triton.jit
def _row_start(row, size_j, size_k, stride_i, stride_j, stride_k):
    """Where rows start, in elements: [BLOCK_M] int64."""
    k = row % size_k
    ij = row // size_k
    j = ij % size_j
    i = ij // size_j
    return i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j + k.to(tl.int64) * stride_k


@triton.jit
def _affine(x_hat, weight_ptr, bias_ptr, n, inside, weight_offset, dtype: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """x_hat · (weight + offset) + bias, x_hat rounded to the input type before it where the model does so."""
    y = x_hat
    if ROUND_FIRST:
        y = y.to(dtype).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32) + weight_offset
        y = y * weight[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, cols, x_j, x_k, x_stride_i, x_stride_j, x_stride_k, r_j, r_k, r_stride_i, r_stride_j, r_stride_k,
    eps, weight_offset,
    CENTRED: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows: y = (x - mean) · rstd · weight + bias, x + residual first where there is one.

    Grid: cdiv(rows, BLOCK_M). Registers only: a tile of BLOCK_M × BLOCK_N. Bound by memory: x (and residual) are read
    once, y (and the sum) written once.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = n < cols
    live = m < rows
    tile = live[:, None] & inside[None, :]
    start = _row_start(m, x_j, x_k, x_stride_i, x_stride_j, x_stride_k)
    x = tl.load(x_ptr + start[:, None] + n[None, :], mask=tile, other=0.0)  # [BLOCK_M, BLOCK_N]
    out = m.to(tl.int64)[:, None] * cols + n[None, :]
    if residual_ptr is not None:
        start_r = _row_start(m, r_j, r_k, r_stride_i, r_stride_j, r_stride_k)
        residual = tl.load(residual_ptr + start_r[:, None] + n[None, :], mask=tile, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, x, mask=tile)
    x = x.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1) / cols
        x = tl.where(inside[None, :], x - mean[:, None], 0.0)
        tl.store(mean_ptr + m, mean, mask=live)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / cols + eps)  # [BLOCK_M]
    tl.store(rstd_ptr + m, rstd, mask=live)
    y = _affine(x * rstd[:, None], weight_ptr, bias_ptr, n, inside, weight_offset, y_ptr.dtype.element_ty, ROUND_FIRST)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=tile)


@triton.jit
def norm_fwd_long_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, cols, x_j, x_k, x_stride_i, x_stride_j, x_stride_k, r_j, r_k, r_stride_i, r_stride_j, r_stride_k,
    eps, weight_offset,
    CENTRED: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row too long for the registers: statistics chunk by chunk (Chan's merge), then a second read to normalise.

    Grid: rows. Bound by memory: x is read twice, the second time mostly from the L2 cache.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_N)
    x_ptr += _row_start(row, x_j, x_k, x_stride_i, x_stride_j, x_stride_k)
    out = row.to(tl.int64) * cols
    mean = 0.0
    spread = 0.0  # sum of (x - mean)² over the columns seen; of x² when not CENTRED
    if residual_ptr is not None:
        residual_ptr += _row_start(row, r_j, r_k, r_stride_i, r_stride_j, r_stride_k)
    for first in range(0, cols, BLOCK_N):
        n = first + lanes
        inside = n < cols
        x = tl.load(x_ptr + n, mask=inside, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + n, mask=inside, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
            tl.store(sum_ptr + out + n, x, mask=inside)
        x = x.to(tl.float32)
        if CENTRED:
            count = tl.minimum(cols - first, BLOCK_N).to(tl.float32)
            chunk_mean = tl.sum(x) / count
            x = tl.where(inside, x - chunk_mean, 0.0)
            apart = chunk_mean - mean
            share = count / (first + count)
            spread += tl.sum(x * x) + apart * apart * first * share
            mean += apart * share
        else:
            spread += tl.sum(x * x)
    rstd = 1.0 / tl.sqrt(spread / cols + eps)
    tl.store(rstd_ptr + row, rstd)
    if CENTRED:
        tl.store(mean_ptr + row, mean)
    for first in range(0, cols, BLOCK_N):
        n = first + lanes
        inside = n < cols
        x = tl.load(x_ptr + n, mask=inside, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + n, mask=inside, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        x_hat = ((x.to(tl.float32) - mean) * rstd)[None, :]
        y = _affine(x_hat, weight_ptr, bias_ptr, n, inside, weight_offset, y_ptr.dtype.element_ty, ROUND_FIRST)
        y = tl.reshape(y, (BLOCK_N,))
        tl.store(y_ptr + out + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, cols, rows_each, y_j, y_k, y_stride_i, y_stride_j, y_stride_k, s_j, s_k, s_stride_i, s_stride_j, s_stride_k,
    x_j, x_k, x_stride_i, x_stride_j, x_stride_k, weight_offset,
    CENTRED: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of the rows this program owns, and its share of dweight and dbias (fp32, one row of the partial sums).

    dx = rstd · (g - mean(g) - x_hat · mean(g · x_hat)) + dsum with g = dy · weight; mean(g) only when CENTRED.
    Grid: as many programs as own rows_each rows. Registers only. Bound by memory: x, dy read once, dx written once.
    """
    program = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    inside = n < cols
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + n, mask=inside, other=0.0)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = tl.minimum((program + 1) * rows_each, rows)
    for first in tl.range(program * rows_each, last, BLOCK_M, num_stages=STAGES):
        m = first + tl.arange(0, BLOCK_M)
        live = m < last
        tile = live[:, None] & inside[None, :]
        start = _row_start(m, x_j, x_k, x_stride_i, x_stride_j, x_stride_k)
        x_hat = tl.load(x_ptr + start[:, None] + n[None, :], mask=tile, other=0.0).to(tl.float32)
        start = _row_start(m, y_j, y_k, y_stride_i, y_stride_j, y_stride_k)
        dy = tl.load(dy_ptr + start[:, None] + n[None, :], mask=tile, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + m, mask=live, other=0.0)[:, None]
        if CENTRED:
            x_hat -= tl.load(mean_ptr + m, mask=live, other=0.0)[:, None]
        x_hat = tl.where(tile, x_hat * rstd, 0.0)
        if dweight_ptr is not None:
            dweight += dy * x_hat
        if dbias_ptr is not None:
            dbias += dy
        g = dy
        if weight_ptr is not None:
            g = g * (weight.to(tl.float32) + weight_offset)[None, :]
        dx = g - x_hat * (tl.sum(g * x_hat, axis=1) / cols)[:, None]
        if CENTRED:
            dx -= (tl.sum(g, axis=1) / cols)[:, None]
        dx *= rstd
        if dsum_ptr is not None:
            start = _row_start(m, s_j, s_k, s_stride_i, s_stride_j, s_stride_k)
            dx += tl.load(dsum_ptr + start[:, None] + n[None, :], mask=tile, other=0.0).to(tl.float32)
        out = m.to(tl.int64)[:, None] * cols + n[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=tile)
    partial = program.to(tl.int64) * cols + n
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=inside)


@triton.jit
def norm_bwd_long_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr,
    cols, y_j, y_k, y_stride_i, y_stride_j, y_stride_k, s_j, s_k, s_stride_i, s_stride_j, s_stride_k,
    x_j, x_k, x_stride_i, x_stride_j, x_stride_k, weight_offset,
    CENTRED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row too long for the registers: the two means first, then a second read. Grid: rows."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_N)
    x_ptr += _row_start(row, x_j, x_k, x_stride_i, x_stride_j, x_stride_k)
    dy_ptr += _row_start(row, y_j, y_k, y_stride_i, y_stride_j, y_stride_k)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if CENTRED:
        mean = tl.load(mean_ptr + row)
    with_x = tl.zeros((BLOCK_N,), tl.float32)
    alone = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, cols, BLOCK_N):
        n = first + lanes
        inside = n < cols
        g = tl.load(dy_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32) + weight_offset
        x_hat = (tl.load(x_ptr + n, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        with_x += g * x_hat
        alone += g
    with_x_mean = tl.sum(with_x) / cols
    g_mean = 0.0
    if CENTRED:
        g_mean = tl.sum(alone) / cols
    if dsum_ptr is not None:
        dsum_ptr += _row_start(row, s_j, s_k, s_stride_i, s_stride_j, s_stride_k)
    for first in range(0, cols, BLOCK_N):
        n = first + lanes
        inside = n < cols
        g = tl.load(dy_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32) + weight_offset
        x_hat = (tl.load(x_ptr + n, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dx = rstd * (g - g_mean - x_hat * with_x_mean)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row.to(tl.int64) * cols + n, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_columns_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,
    rows, cols, rows_each, y_j, y_k, y_stride_i, y_stride_j, y_stride_k, x_j, x_k, x_stride_i, x_stride_j, x_stride_k,
    CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial dweight and dbias of rows_each rows in BLOCK_N columns, for rows too long for `norm_bwd_kernel`.

    Grid: (groups of rows, cdiv(cols, BLOCK_N)). Bound by memory: x and dy are read once more.
    """
    group = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < cols
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = tl.minimum((group + 1) * rows_each, rows)
    for first in range(group * rows_each, last, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        live = m < last
        tile = live[:, None] & inside[None, :]
        start = _row_start(m, y_j, y_k, y_stride_i, y_stride_j, y_stride_k)
        dy = tl.load(dy_ptr + start[:, None] + n[None, :], mask=tile, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            start = _row_start(m, x_j, x_k, x_stride_i, x_stride_j, x_stride_k)
            x_hat = tl.load(x_ptr + start[:, None] + n[None, :], mask=tile, other=0.0).to(tl.float32)
            if CENTRED:
                x_hat -= tl.load(mean_ptr + m, mask=live, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + m, mask=live, other=0.0)[:, None]
            dweight += tl.where(tile, dy * x_hat * rstd, 0.0)
        dbias += dy
    partial = group.to(tl.int64) * cols + n
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=inside)


@triton.jit
def norm_bwd_reduce_kernel(partial_ptr, out_ptr, programs, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dweight or dbias: the sum of the partial sums, in the order of the programs. Grid: cdiv(cols, BLOCK_N)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < cols
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, programs, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        tile = (m < programs)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + m.to(tl.int64)[:, None] * cols + n[None, :], mask=tile, other=0.0)
    tl.store(out_ptr + n, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    centred: bool,
    weight_offset: float = 0.0,
    round_first: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, x + residual (None without residual), mean (None unless centred), rstd."""
    shape, cols = x.shape, x.shape[-1]
    y = _contiguous_like(x)
    total = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centred else None
    rows = rstd.numel()
    if cols == 0:  # the mean over nothing
        rstd.fill_(math.nan)
        return y, total, None if mean is None else mean.fill_(math.nan), rstd
    x, x_rows = rows_of(x)
    residual, r_rows = (None, None) if residual is None else rows_of(residual)
    tensors = (x, residual, weight, bias, y, total, mean, rstd)
    numbers = (rows, cols, *_flat(x_rows), *_flat(r_rows), float(eps), float(weight_offset))
    constants: dict[str, Any] = {"CENTRED": centred, "ROUND_FIRST": round_first}
    mixed = weight is not None and weight.dtype != x.dtype  # float32 weights take the registers of twice the columns
    if cols > (_WIDEST_FWD // 2 if mixed else _WIDEST_FWD):
        constants |= {"BLOCK_N": _CHUNK}
        launch.run(norm_fwd_long_kernel, (rows,), tensors, numbers, constants, num_warps=16)
    else:
        block, share, warps = _plan(cols, rows, launch.sms(x.device), 1024)
        constants |= {"BLOCK_M": share, "BLOCK_N": block}
        launch.run(norm_fwd_kernel, (launch.cdiv(rows, share),), tensors, numbers, constants, num_warps=warps)
    return y, total, mean, rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias; a dtype of None means that this gradient is not wanted."""
    dx = _contiguous_like(x)
    cols, rows = x.shape[-1], rstd.numel()
    dweight, dbias = (vector_gradient(dtype, cols, rows, x.device) for dtype in (dweight_dtype, dbias_dtype))
    if dx.numel() == 0:
        return dx, dweight, dbias
    dy, y_rows = rows_of(dy)
    x, x_rows = rows_of(x)
    dsum, s_rows = (None, None) if dsum is None else rows_of(dsum)
    strides = (*_flat(y_rows), *_flat(s_rows), *_flat(x_rows))
    sms = launch.sms(x.device)
    if cols <= _WIDEST_BWD:
        block, share, warps = _plan(cols, rows, sms, 512)
        programs, rows_each = _ownership(rows, share, sms * max(1, min(4, 8192 // block)))
        partials = _partials((dweight, dbias), programs, cols)
        launch.run(
            norm_bwd_kernel,
            (programs,),
            (dy, dsum, x, weight, mean, rstd, dx, *partials),
            (rows, cols, rows_each, *strides, float(weight_offset)),
            {"CENTRED": mean is not None, "STAGES": _STAGES, "BLOCK_M": share, "BLOCK_N": block},
            num_warps=warps,
        )
    else:
        launch.run(
            norm_bwd_long_kernel,
            (rows,),
            (dy, dsum, x, weight, mean, rstd, dx),
            (cols, *strides, float(weight_offset)),
            {"CENTRED": mean is not None, "BLOCK_N": _CHUNK},
            num_warps=16,
        )
        programs, rows_each = _ownership(rows, 4, max(1, 8 * sms // launch.cdiv(cols, 512)))
        partials = _partials((dweight, dbias), programs, cols)
        if partials != (None, None):
            launch.run(
                norm_bwd_columns_kernel,
                (programs, launch.cdiv(cols, 512)),
                (dy, x, mean, rstd, *partials),
                (rows, cols, rows_each, *_flat(y_rows), *_flat(x_rows)),
                {"CENTRED": mean is not None, "BLOCK_M": 4, "BLOCK_N": 512},
                num_warps=8,
            )
    for partial, out in zip(partials, (dweight, dbias), strict=True):
        if out is not None:
            grid, constants = (launch.cdiv(cols, 64),), {"BLOCK_M": 32, "BLOCK_N": 64}
            launch.run(norm_bwd_reduce_kernel, grid, (partial, out), (programs, cols), constants, num_warps=4)
    return dx, dweight, dbias


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _flat(rows: Rows | None) -> tuple[int, ...]:
    return (1, 1, 0, 0, 0) if rows is None else (*rows.sizes, *rows.strides)


def _ownership(rows: int, share: int, programs: int) -> tuple[int, int]:
    """How many programs own how many rows each (a multiple of `share`), so that none is idle."""
    rows_each = share * launch.cdiv(launch.cdiv(rows, share), programs)
    return launch.cdiv(rows, rows_each), rows_each


def _partials(outputs: tuple[Tensor | None, ...], programs: int, cols: int) -> tuple[Tensor | None, ...]:
    """Room for one partial sum per program, for the gradients that are wanted."""
    return tuple(
        None if out is None else torch.empty(programs, cols, dtype=torch.float32, device=out.device) for out in outputs
    )
