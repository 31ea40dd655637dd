"""rope and rope_qk in Triton."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastattn.runtime import launch

_ELEMENTS = 2048  # pairs per program, by analysis: 4 warps with 16-byte accesses, twice


@triton.jit
def rotate_heads(
    x_ptr, y_ptr, x_rows, y_rows, x_head, y_head, here, first, nheads, headdim, c, s, half,
    INTERLEAVED: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_H heads at BLOCK_M positions, which start x_rows and y_rows in. Copies the columns past 2 · half."""
    h = first + tl.arange(0, BLOCK_H)
    live = here[:, None, None] & (h < nheads)[None, :, None]
    x_ptr += x_rows[:, None, None] + h.to(tl.int64)[None, :, None] * x_head  # [BLOCK_M, BLOCK_H, 1]
    y_ptr += y_rows[:, None, None] + h.to(tl.int64)[None, :, None] * y_head
    dtype = y_ptr.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_D)[None, None, :]
        tile = live & (both < 2 * half)
        x = tl.load(x_ptr + both, mask=tile, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_H, BLOCK_D, 2)))  # [BLOCK_M, BLOCK_H, BLOCK_D] each
        y = tl.join(a * c - b * s, b * c + a * s)
        tl.store(y_ptr + both, tl.reshape(y, (BLOCK_M, BLOCK_H, 2 * BLOCK_D)).to(dtype), mask=tile)
    else:
        d = tl.arange(0, BLOCK_D)[None, None, :]
        tile = live & (d < half)
        a = tl.load(x_ptr + d, mask=tile, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + half + d, mask=tile, other=0.0).to(tl.float32)
        tl.store(y_ptr + d, (a * c - b * s).to(dtype), mask=tile)
        tl.store(y_ptr + half + d, (b * c + a * s).to(dtype), mask=tile)
    if TAIL > 0:
        rest = 2 * half + tl.arange(0, TAIL)[None, None, :]
        tile = live & (rest < headdim)
        tl.store(y_ptr + rest, tl.load(x_ptr + rest, mask=tile, other=0.0), mask=tile)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, ids_ptr,
    rows, seqlen, nheads, nheads_k, headdim, headdim_k, half, table_rows, q_groups,
    q_batch, q_row, q_head, qo_batch, qo_row, qo_head, k_batch, k_row, k_head, ko_batch, ko_row, ko_head,
    cos_batch, cos_row, sin_batch, sin_row, ids_batch, ids_row,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TAIL: tl.constexpr, TAIL_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A group of heads of q, or of k, at BLOCK_M positions: (a, b) -> (a cos - b sin, b cos + a sin) for every pair.

    Grid: (cdiv(batch · seqlen, BLOCK_M), groups of q's heads + groups of k's heads). Registers only. Bound by memory:
    q and k are read and written once, a row of the tables once per group. A position outside of the tables gives NaN.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    here = row < rows
    b = (row // seqlen).to(tl.int64)
    m = (row % seqlen).to(tl.int64)
    position = m
    if ids_ptr is not None:
        position = tl.load(ids_ptr + b * ids_batch + m * ids_row, mask=here, other=0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    known = (here & (position >= 0) & (position < table_rows))[:, None] & (d < half)
    nan = float("nan")
    c = tl.load(cos_ptr + (b * cos_batch + position * cos_row)[:, None] + d, mask=known, other=nan)
    s = tl.load(sin_ptr + (b * sin_batch + position * sin_row)[:, None] + d, mask=known, other=nan)
    c = c.to(tl.float32)[:, None, :]
    s = s.to(tl.float32)[:, None, :]
    if INVERSE:
        s = -s
    if group < q_groups:
        rotate_heads(
            q_ptr, q_out_ptr, b * q_batch + m * q_row, b * qo_batch + m * qo_row, q_head, qo_head, here,
            group * BLOCK_H, nheads, headdim, c, s, half, INTERLEAVED, TAIL, BLOCK_M, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    elif k_ptr is not None:
        rotate_heads(
            k_ptr, k_out_ptr, b * k_batch + m * k_row, b * ko_batch + m * ko_row, k_head, ko_head, here,
            (group - q_groups) * BLOCK_H_K, nheads_k, headdim_k, c, s, half, INTERLEAVED, TAIL_K, BLOCK_M, BLOCK_H_K,
            BLOCK_D,
        )  # fmt: skip


def forward(op, x, k, cos, sin, position_ids, interleaved, inverse):
    """The rotated x and k (None without k), laid out like them."""
    y = torch.empty_like(x)
    k_out = None if k is None else torch.empty_like(k)
    seqlen, nheads, headdim = x.shape[-3:]
    rows = x.shape[0] * seqlen if x.dim() == 4 else seqlen
    half = cos.shape[-1]
    nheads_k, headdim_k = (0, 0) if k is None else k.shape[-2:]
    grid, groups, constants = _plan(rows, half, nheads, headdim, nheads_k, headdim_k, launch.sms(x.device))
    ids = (0, 0) if position_ids is None else _ids(position_ids)
    launch.run(
        rope_kernel,
        grid,
        (x, k, y, k_out, cos, sin, position_ids),
        (
            rows, seqlen, nheads, nheads_k, headdim, headdim_k, half, cos.shape[-2], groups,
            *_strides(x), *_strides(y), *_strides(k), *_strides(k_out), *_table(cos), *_table(sin), *ids,
        ),
        {"INTERLEAVED": interleaved, "INVERSE": inverse, **constants},
        num_warps=4,
    )  # fmt: skip
    return y, k_out


@functools.lru_cache(4096)
def _plan(
    rows: int, half: int, nheads: int, headdim: int, nheads_k: int, headdim_k: int, sms: int
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid, the groups of q's heads and the tile. nheads_k is 0 without k."""
    width = launch.next_power_of_2(max(half, 1))
    share, share_k = _share(nheads, width), _share(nheads_k, width) if nheads_k else 1
    groups, groups_k = launch.cdiv(nheads, share), launch.cdiv(nheads_k, share_k)
    block = max(1, _ELEMENTS // (width * max(share, share_k)))
    while block > 1 and rows < 2 * block * sms:
        block //= 2
    tile = {"BLOCK_M": block, "BLOCK_H": share, "BLOCK_H_K": share_k, "BLOCK_D": width}
    tails = {"TAIL": _tail(headdim, half), "TAIL_K": _tail(headdim_k, half) if nheads_k else 0}
    return (launch.cdiv(rows, block), groups + groups_k), groups, {**tails, **tile}


def _share(nheads: int, width: int) -> int:
    """Heads per program: the most that fit and leave the fewest lanes idle."""
    fits = [1 << i for i in range(12) if (1 << i) * width <= _ELEMENTS and 1 << i < 2 * nheads] or [1]
    return min(reversed(fits), key=lambda share: -(-nheads // share) * share)


def _tail(headdim: int, half: int) -> int:
    """Room for the columns that are not rotated."""
    return launch.next_power_of_2(headdim - 2 * half) if headdim > 2 * half else 0


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    """batch (0 if packed), row, head."""
    if x is None:
        return 0, 0, 0
    strides = x.stride()[:-1]
    return strides if len(strides) == 3 else (0, *strides)


def _table(table: torch.Tensor) -> tuple[int, int]:
    return (table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0, table.stride(-2))


def _ids(ids: torch.Tensor) -> tuple[int, int]:
    return (ids.stride(0) if ids.dim() == 2 and ids.shape[0] > 1 else 0, ids.stride(-1))
