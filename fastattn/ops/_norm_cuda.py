"""layer_norm and rms_norm on the CUDA C++ kernels (csrc/cuda/norm_*.cuh): which kernel serves which rows.

Rows move in packs of 16 bytes where their addresses and lengths allow, else element by element. A row lies in the
registers of as few threads as hold it, longer ones in the shared memory of a block or of a cluster; the longest are read
twice. The reasons are in docs/design/cuda-kernels.md.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from fastattn.ops._norm import Rows, rows_of, vector_gradient
from fastattn.runtime import cuda
from fastattn.runtime.gpu import shared_limit

Tensor = torch.Tensor
_FWD, _BWD, _REDUCE = (("norm_params.h", f"Norm{name}Params") for name in ("Fwd", "Bwd", "Reduce"))
_SHARING = 128  # threads of a block whose warps work on different rows
_MOST = 512  # threads of a block; kNormLongThreads
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
    residual, r_rows = (None, None) if residual is None else rows_of(residual)
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
    dtype: torch.dtype,
    vector: torch.dtype,
    cols: int,
    rows: int,
    x: Rows,
    residual: Rows | None,
    aligned: bool,
    arch: int,
) -> Plan:
    width = _width(dtype, cols, (x, residual), aligned)
    packs = -(-cols // width)
    each = 4 if width > 1 else 8  # packs per thread
    names: tuple[str, ...] = (cuda.TYPES[dtype], cuda.TYPES[vector], str(width))
    if packs > _MOST * each:
        copied = 2 if residual and width > 1 else 1  # tensors
        blocks, piece = _pieces(packs, width * dtype.itemsize * copied, width > 1 and arch >= 90, shared_limit(arch))
        names = (*names, str(each), _flag(blocks > 0), _flag(blocks > 1))
        shared = _SCRATCH + (piece * width * dtype.itemsize * copied if blocks else 0)
        blocks = max(1, blocks)
        kernel = cuda.kernel("norm_fwd_long.cuh", "norm_fwd_long_kernel", names, _FWD, _MOST, shared, blocks)
        return Plan(kernel, (rows * blocks, 1, 1), (rows, cols, _MOST, piece * width, *_flat(x, residual)))
    threads, at_once, shared = _SHARING, 1, 0
    if width > 1 and packs <= 32:  # several short rows per thread instead of several packs
        lanes, each, at_once = _power_of_2(packs), 1, 4
    else:
        lanes = _lanes(packs, each)
    if lanes > 32:
        threads, shared = lanes, _SCRATCH
    names = (*names, str(each), str(at_once))
    kernel = cuda.kernel("norm_fwd.cuh", "norm_fwd_kernel", names, _FWD, threads, shared)
    blocks = -(-rows // (at_once * (threads // lanes)))
    return Plan(kernel, (blocks, 1, 1), (rows, cols, lanes, 0, *_flat(x, residual)))


def _pieces(packs: int, size: int, clusters: bool, limit: int) -> tuple[int, int]:
    """How many blocks hold a row of packs of so many bytes in shared memory, and the packs of each; 0 blocks: it is too
    long. As few as let two blocks share a multiprocessor (which keeps 1 KiB of each), else as few as hold it."""
    for most in ((limit - 1024) // 2, limit):
        for blocks in (1, 2, 4, 8) if clusters else (1,):
            piece = -(-packs // blocks)
            if _SCRATCH + piece * size <= most:
                return blocks, piece
    return 0, packs


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
    dsum, s_rows = (None, None) if dsum is None else rows_of(dsum)
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
    all_rows: tuple[Rows, Rows | None, Rows],
    aligned: bool,
    wanted: bool,
    arch: int,
    sms: int,
) -> tuple[Plan, Plan | None]:
    """What makes dx, and what makes the partial sums of dweight and dbias where that does not; all_rows: of dy, dsum, x."""
    width = _width(dtype, cols, all_rows, aligned)
    packs = -(-cols // width)
    types, numbers = (cuda.TYPES[dtype], cuda.TYPES[vector]), _flat(*all_rows)
    held = _held(packs, width, vector.itemsize, all_rows[1] is not None, arch)
    if held is None:
        return _long_backward_plan(types, width, cols, rows, numbers, wanted, sms)
    lanes = _lanes(packs, held.each * held.blocks)
    if held.blocks > 1:  # the multiprocessors that form whole clusters come in eights, as far as is known
        threads, blocks = lanes, max(1, sms // 8 * 8 // held.blocks)
    else:  # as many rows per block as leave every multiprocessor some, and fill it
        least = max(lanes, 32)
        most, share = _MOST // least, max(1, rows * lanes // (sms * least))
        threads = least * (most if share >= most else 1 << (share.bit_length() - 1))
        blocks = sms * (_MOST // threads)
    shared = 2 * _SCRATCH + threads * held.size
    if threads > lanes:
        shared = max(shared, 4 * threads * held.each * width)
    groups = min(-(-rows // (threads // lanes)), blocks)
    names = (*types, str(width), str(held.each), str(held.stages), _flag(held.blocks > 1))
    kernel = cuda.kernel("norm_bwd.cuh", "norm_bwd_kernel", names, _BWD, threads, shared, held.blocks)
    return Plan(kernel, (groups * held.blocks, 1, 1), (rows, cols, lanes, *numbers), groups), None


class _Held(NamedTuple):
    """How norm_bwd_kernel holds a row: in so many blocks, packs per thread, rows under way, bytes of shared memory per
    thread."""

    blocks: int
    each: int
    stages: int
    size: int


def _held(packs: int, width: int, weight_bytes: int, dsum: bool, arch: int) -> _Held | None:
    """None: the row is too long."""
    if width == 1:
        return _Held(1, 8, 1, 0) if packs <= 8 * _MOST else None
    ways = [(1, 3, 2), (1, 3, 1)] if 64 < packs <= 96 else []  # in one warp, where 2 packs take two
    ways.append((1, 2, 2))
    if arch >= 90:
        ways += [(1, 4, 2), (2, 4, 2), (2, 2, 2), (4, 4, 2), (4, 2, 2), (8, 4, 2), (8, 2, 2)]
    else:
        ways += [(1, 4, 2), (1, 4, 1)]
    for blocks, each, stages in ways:
        other = 0 if each == 2 else each * (width * weight_bytes + 16 * dsum)  # else they are in registers
        size = 32 * each * stages + other
        if packs <= blocks * each * _MOST and 2 * _SCRATCH + _MOST * size <= shared_limit(arch):
            return _Held(blocks, each, stages, size)
    return None


def _lanes(packs: int, each: int) -> int:
    """The threads that share a row: a power of two within a warp, or whole warps."""
    return _power_of_2(-(-packs // each)) if packs <= 32 * each else -(-packs // (32 * each)) * 32


def _long_backward_plan(
    types: tuple[str, str], width: int, cols: int, rows: int, numbers: tuple[int, ...], wanted: bool, sms: int
) -> tuple[Plan, Plan | None]:
    names: tuple[str, ...] = (*types, str(width), "4" if width > 1 else "8")
    kernel = cuda.kernel("norm_bwd_long.cuh", "norm_bwd_long_kernel", names, _BWD, _MOST, _SCRATCH)
    dx = Plan(kernel, (rows, 1, 1), (rows, cols, _MOST, *numbers))
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


def _width(dtype: torch.dtype, cols: int, rows: tuple[Rows | None, ...], aligned: bool) -> int:
    """Elements per pack: those of 16 bytes where every pack starts at a multiple of that, else 1."""
    width = 16 // dtype.itemsize
    steps = (cols, *(stride for one in rows if one for stride in one.strides))
    return width if aligned and all(step % width == 0 for step in steps) else 1


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _flat(*rows: Rows | None) -> tuple[int, ...]:
    """As the parameter structs have them: the sizes of each, then the strides of each."""
    present = [one or _NO_ROWS for one in rows]
    return (*(n for one in present for n in one.sizes), *(n for one in present for n in one.strides))
