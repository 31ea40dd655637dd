"""layer_norm and rms_norm on the CUDA C++ kernels (csrc/cuda/norm_*.cuh): which kernel serves which rows.

Rows move in packs of 16 bytes where their addresses and lengths allow, else element by element. A row lies in the
registers of as few threads as hold it, of one block or of a cluster; the longest are read twice. By analysis, not measured.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from fastattn.ops._norm import Rows, rows_of, vector_gradient
from fastattn.runtime import cuda

Tensor = torch.Tensor
_FWD, _BWD, _REDUCE = (("norm_params.h", f"Norm{name}Params") for name in ("Fwd", "Bwd", "Reduce"))
_SHARING = 128  # threads of a block whose warps work on different rows
_LONG = 512  # kNormLongThreads
_SCRATCH = 2 * 4 * (32 + 8)  # bytes of two SumScratch<1>
_NO_ROWS = Rows((1, 1), (0, 0, 0))


class Plan(NamedTuple):
    """A kernel, its grid, and the numbers of its parameter struct up to the strides."""

    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    groups: int = 0  # of rows, each with a row of partial sums; 0: another kernel makes them


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
    shape, dtype, device = x.shape, x.dtype, x.device
    y = torch.empty(shape, dtype=dtype, device=device)
    total = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    mean = torch.empty_like(rstd) if centred else None
    if y.numel() == 0:
        if shape[-1] == 0:  # the mean over nothing
            rstd.fill_(math.nan)
            mean = None if mean is None else mean.fill_(math.nan)
        return y, total, mean, rstd
    x, x_rows = rows_of(x)
    residual, r_rows = (None, _NO_ROWS) if residual is None else rows_of(residual)
    vector = weight if weight is not None else bias
    vector_dtype = dtype if vector is None else vector.dtype
    aligned = _aligned(x, residual, weight, bias)
    plan = _forward_plan(dtype, vector_dtype, shape[-1], rstd.numel(), x_rows, r_rows, aligned, cuda.arch(device))
    offset = 0.0 if weight is None else weight_offset
    tensors = (x, residual, weight, bias, y, total, mean, rstd)
    cuda.run(plan.kernel, plan.grid, (*tensors, *plan.numbers, eps, offset, round_first), device)
    return y, total, mean, rstd


@functools.lru_cache(4096)
def _forward_plan(
    dtype: torch.dtype, vector: torch.dtype, cols: int, rows: int, x: Rows, residual: Rows, aligned: bool, arch: int
) -> Plan:
    width = _width(dtype, cols, (x, residual), aligned)
    packs = -(-cols // width)
    each = 4 if width > 1 else 8  # packs per thread
    wide, at_once, cluster, shared = width > 1, 1, 1, _SCRATCH
    if wide and packs <= 32:  # several short rows per thread instead of several packs
        lanes, threads, each, at_once, shared = _power_of_2(packs), _SHARING, 1, 4, 0
    elif packs <= 32 * each:
        lanes, threads, shared = _power_of_2(-(-packs // each)), _SHARING, 0
    else:
        cluster = _cluster(packs, 512 * each, 1024 * each, wide and arch >= 90)
        lanes = threads = _warps(packs, each * cluster) if cluster else _LONG
    names: tuple[str, ...] = (cuda.TYPES[dtype], cuda.TYPES[vector], str(width), str(each))
    if cluster:
        names = (*names, str(at_once), "true" if cluster > 1 else "false")
        kernel = cuda.kernel("norm_fwd.cuh", "norm_fwd_kernel", names, _FWD, threads, shared, cluster)
        blocks = -(-rows // (at_once * (threads // lanes))) * cluster
    else:
        kernel = cuda.kernel("norm_fwd_long.cuh", "norm_fwd_long_kernel", names, _FWD, threads, shared)
        blocks = rows
    return Plan(kernel, (blocks, 1, 1), (rows, cols, lanes, *_flat(x, residual)))


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
    dtype, device, cols, rows = x.dtype, x.device, x.shape[-1], rstd.numel()
    dx = torch.empty(x.shape, dtype=dtype, device=device)
    dweight, dbias = (vector_gradient(t, cols, rows, device) for t in (dweight_dtype, dbias_dtype))
    if dx.numel() == 0:
        return dx, dweight, dbias
    dy, y_rows = rows_of(dy)
    x, x_rows = rows_of(x)
    dsum, s_rows = (None, _NO_ROWS) if dsum is None else rows_of(dsum)
    vector_dtype = dtype if weight is None else weight.dtype
    all_rows, aligned = (y_rows, s_rows, x_rows), _aligned(dy, dsum, x, weight)
    arch, sms = cuda.arch(device), cuda.sms(device)
    wanted = dweight is not None or dbias is not None
    plan, columns = _backward_plan(dtype, vector_dtype, cols, rows, all_rows, aligned, wanted, arch, sms)
    offset = 0.0 if weight is None else weight_offset
    groups = (columns or plan).groups
    partial = [
        None if t is None else torch.empty(groups, cols, dtype=torch.float32, device=device) for t in (dweight, dbias)
    ]
    for one in (plan, columns):
        if one is not None:
            own = partial if one.groups else (None, None)
            cuda.run(one.kernel, one.grid, (dy, dsum, x, weight, mean, rstd, dx, *own, *one.numbers, offset), device)
    if wanted:
        kernel = _reduce_kernel(dweight_dtype or dbias_dtype)
        helpers = min(16, _power_of_2(-(-groups // 4)))
        cuda.run(
            kernel, (-(-cols // (512 // helpers)), 2, 1), (*partial, dweight, dbias, groups, cols, helpers), device
        )
    return dx, dweight, dbias


@functools.lru_cache(4096)
def _backward_plan(
    dtype: torch.dtype,
    vector: torch.dtype,
    cols: int,
    rows: int,
    all_rows: tuple[Rows, Rows, Rows],
    aligned: bool,
    wanted: bool,
    arch: int,
    sms: int,
) -> tuple[Plan, Plan | None]:
    """What makes dx, and what makes the partial sums of dweight and dbias where that does not."""
    width = _width(dtype, cols, all_rows, aligned)
    packs = -(-cols // width)
    each = 2 if width > 1 else 8  # packs per thread
    cluster = 1 if packs <= 512 * each else _cluster(packs, 384 * each, 384 * each, width > 1 and arch >= 90)
    shared = 2 * _SCRATCH
    types, numbers = (cuda.TYPES[dtype], cuda.TYPES[vector]), _flat(*all_rows)
    if cluster == 0:
        return _long_backward_plan(types, width, cols, rows, numbers, wanted, sms)
    lanes = _power_of_2(-(-packs // each)) if packs <= 32 * each else _warps(packs, each * cluster)
    if cluster > 1:  # the multiprocessors that form whole clusters come in eights, as far as is known
        threads, blocks = lanes, max(1, sms // 8 * 8 // cluster)
    else:  # as many rows per block as leave every multiprocessor some, and fill it
        least = max(lanes, 32)
        most, share = 512 // least, max(1, rows * lanes // (sms * least))
        threads = least * (most if share >= most else 1 << (share.bit_length() - 1))
        blocks = sms * (512 // threads)
        shared = shared if threads == lanes else max(shared, 4 * threads * each * width)
    groups = min(-(-rows // (threads // lanes)), blocks)
    names = (*types, str(width), str(each), "true" if cluster > 1 else "false")
    kernel = cuda.kernel("norm_bwd.cuh", "norm_bwd_kernel", names, _BWD, threads, shared, cluster)
    return Plan(kernel, (groups * cluster, 1, 1), (rows, cols, lanes, *numbers), groups), None


def _long_backward_plan(
    types: tuple[str, str], width: int, cols: int, rows: int, numbers: tuple[int, ...], wanted: bool, sms: int
) -> tuple[Plan, Plan | None]:
    names: tuple[str, ...] = (*types, str(width), "4" if width > 1 else "8")
    kernel = cuda.kernel("norm_bwd_long.cuh", "norm_bwd_long_kernel", names, _BWD, _LONG, _SCRATCH)
    dx = Plan(kernel, (rows, 1, 1), (rows, cols, _LONG, *numbers))
    if not wanted:
        return dx, None
    tiles = -(-cols // (32 * width))
    groups = min(-(-rows // 8), max(1, 4 * sms // tiles))
    names = (types[0], str(width), "4")
    kernel = cuda.kernel("norm_bwd_long.cuh", "norm_bwd_columns_kernel", names, _BWD, 256, 1024 * width)
    return dx, Plan(kernel, (tiles, groups, 1), (rows, cols, 32, *numbers), groups)


@functools.cache
def _reduce_kernel(dtype: torch.dtype) -> cuda.Kernel:
    return cuda.kernel("norm_reduce.cuh", "norm_reduce_kernel", (cuda.TYPES[dtype],), _REDUCE, 512, 2048)


def _aligned(*tensors: Tensor | None) -> bool:
    address = 0
    for tensor in tensors:
        if tensor is not None:
            address |= tensor.data_ptr()
    return not address & 15


def _width(dtype: torch.dtype, cols: int, rows: tuple[Rows, ...], aligned: bool) -> int:
    """Elements per pack: those of 16 bytes where every pack starts at a multiple of that, else 1."""
    width = 16 // dtype.itemsize
    steps = (cols, *(stride for one in rows for stride in one.strides))
    return width if aligned and all(step % width == 0 for step in steps) else 1


def _cluster(packs: int, block: int, most: int, allowed: bool) -> int:
    """Blocks that hold a row, `block` packs each or, where that needs too many, up to `most`; 0: the row is too long."""
    if packs <= block:
        return 1
    for blocks in (2, 4, 8) if allowed else ():
        if packs <= blocks * block:
            return blocks
    return 8 if allowed and packs <= 8 * most else 0


def _warps(packs: int, share: int) -> int:
    """Threads of whole warps, `share` packs for each."""
    return -(-packs // (32 * share)) * 32


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _flat(*rows: Rows) -> tuple[int, ...]:
    """As the parameter structs have them: the sizes of each, then the strides of each."""
    return (*(n for one in rows for n in one.sizes), *(n for one in rows for n in one.strides))
