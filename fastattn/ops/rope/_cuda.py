"""rope on the CUDA C++ kernel (csrc/cuda/rope.cuh)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from fastattn.runtime import cuda

_STRUCT = ("rope_params.h", "RopeParams")
_THREADS, _HEADS = 128, 4  # kRopeThreads, kRopeHeads
Ints = Sequence[int]
_NO_HEADS: tuple[Ints, Ints, Ints] = (0, 0), (0, 0, 0, 0), (0, 0, 0, 0)
_NO_IDS: tuple[Ints, Ints, torch.dtype] = (0,), (0,), torch.int32


def forward(op, x, k, cos, sin, position_ids, interleaved, inverse):
    """The rotated x and k (None without k), laid out like them. A position outside of the tables gives NaN."""
    y, device = torch.empty_like(x), x.device
    address = x.data_ptr() | y.data_ptr() | cos.data_ptr() | sin.data_ptr()
    k_out, k_shapes, ids = None, _NO_HEADS, _NO_IDS
    if k is not None:
        k_out = torch.empty_like(k)
        address |= k.data_ptr() | k_out.data_ptr()
        k_shapes = k.shape, k.stride(), k_out.stride()
    if position_ids is not None:
        ids = position_ids.shape, position_ids.stride(), position_ids.dtype
    shapes, tables = (x.shape, x.stride(), y.stride()), (cos.shape, cos.stride(), sin.stride())
    kernel, grid, numbers = _plan(
        *(x.dtype, cos.dtype, not address & 15, shapes, k_shapes, tables, ids, interleaved, cuda.sms(device))
    )
    cuda.run(kernel, grid, (x, k, y, k_out, cos, sin, position_ids, *numbers, -1.0 if inverse else 1.0), device)
    return y, k_out


@functools.lru_cache(4096)
def _plan(
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    aligned: bool,
    q: tuple[Ints, Ints, Ints],
    k: tuple[Ints, Ints, Ints],
    tables: tuple[Ints, Ints, Ints],
    ids: tuple[Ints, Ints, torch.dtype],
    interleaved: bool,
    sms: int,
) -> tuple[cuda.Kernel, tuple[int, int, int], tuple[int, ...]]:
    """The kernel, its grid, and the numbers of its parameters up to the sign. q, k: shape, strides, strides of the output;
    tables: shape, strides of cos, of sin; ids: shape, strides, dtype."""
    shape, table = q[0], tables[0]
    seqlen, nheads, headdim = shape[-3:]
    rows = seqlen * (shape[0] if len(shape) == 4 else 1)
    nheads_k, headdim_k = k[0][-2:]
    table_rows, half = table[-2:]
    strides = (*_heads(q[1]), *_heads(k[1]), *_heads(q[2]), *_heads(k[2]), *_batched(table, tables[1]))
    strides = (*strides, *_batched(table, tables[2]))
    width = 16 // dtype.itemsize
    if not aligned or any(n % width for n in (*strides, half, headdim, headdim_k)):
        width = 1
    heads, lanes = nheads + nheads_k, min(max(half // width, 1), _THREADS)
    head_lanes = _head_lanes(heads, lanes, rows, sms)
    constants = (cuda.TYPES[dtype], cuda.TYPES[table_dtype], str(width))
    kernel = cuda.kernel("rope.cuh", "rope_kernel", constants, _STRUCT, _THREADS)
    blocks = -(-rows // (_THREADS // (lanes * head_lanes))) if heads else 0
    strides = (*strides, *_batched((*ids[0], 1), (*ids[1], 1)))
    numbers = (*strides, table_rows, rows, seqlen, nheads, nheads_k, headdim, headdim_k, half, lanes, head_lanes)
    return kernel, (blocks, 1, 1), (*numbers, ids[2] == torch.int64, interleaved)


def _head_lanes(heads: int, lanes: int, rows: int, sms: int) -> int:
    """How many heads of a position a block works on at once: the fewest threads idle; by analysis, not measured.

    With few positions all heads at once, which ends soonest.
    """
    most = max(1, _THREADS // lanes)
    if rows < 4 * sms:
        return max(1, min(most, -(-heads // _HEADS)))

    def busy(n: int) -> float:
        turns = -(-heads // (_HEADS * n))
        return heads / (turns * _HEADS * n) * (_THREADS // (lanes * n)) * n

    return max(range(1, most + 1), key=lambda n: (busy(n), n))


def _heads(strides: Ints) -> Ints:
    """batch (0 if packed), row, head."""
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])


def _batched(shape: Ints, strides: Ints) -> tuple[int, int]:
    """batch (0 if there is none, or it is shared), row; of [rows, …] or [batch, rows, …]."""
    return strides[0] if len(shape) == 3 and shape[0] > 1 else 0, strides[-2]
