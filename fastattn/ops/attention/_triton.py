"""The backend `triton`: chooses tiles, gathers the arguments of a call and launches the kernels of `_triton_*.py`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastattn.ops.attention import tuning
from fastattn.ops.attention._arguments import SMALLEST_SCALE, dropout, edge, pair_strides, slopes_stride
from fastattn.ops.attention._arguments import strides as _strides
from fastattn.ops.attention._triton_bias import attention_bwd_dbias_kernel, attention_bwd_dsinks_kernel
from fastattn.ops.attention._triton_bwd import (
    attention_bwd_delta_kernel,
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from fastattn.ops.attention._triton_decode import kvcache as kvcache
from fastattn.ops.attention._triton_fwd import attention_fwd_kernel, attention_weights_kernel
from fastattn.runtime import launch

Tensor = torch.Tensor
_ABSENT = (None, None, None, None)


def _pair_strides(t: Tensor | None) -> tuple[Any, ...]:
    return _ABSENT if t is None else pair_strides(t)


def _sides(t: Tensor | None) -> tuple[bool, bool]:
    """Does a mask or bias have queries, has it keys?"""
    if t is None:
        return False, False
    return t.dim() > 1 and t.shape[-2] > 1, t.dim() > 0 and t.shape[-1] > 1


def _folds(spec: Any) -> bool:
    """Can the scale be multiplied in together with log2 e, in the instruction that subtracts the maximum?"""
    return spec.scale >= SMALLEST_SCALE and spec.softcap is None and not spec.alibi and not spec.bias


@functools.lru_cache(maxsize=4096)
def _constants(
    tile: tuning.Tile, headdim: int, headdim_v: int, group: int, upper_left: bool, fold: bool, tail: bool, pairs: bool,
    sides: tuple[bool, ...], tf32: bool,
) -> dict[str, Any]:  # fmt: skip
    """The constants that all kernels share. tail: there can be boundary tiles; pairs: every tile is one."""
    d, d2 = tuning.split(headdim)
    dv, dv2 = tuning.split(headdim_v)
    names = ("MASK_ROWS", "MASK_COLS", "BIAS_ROWS", "BIAS_COLS")
    return {
        "GROUP": group, "HEADDIM": headdim, "HEADDIM_V": headdim_v, "UPPER_LEFT": upper_left, "FOLD": fold,
        "MASKED": tail or pairs, "WHOLE": not pairs, **dict(zip(names, sides, strict=True)), "TF32": tf32,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "D": d, "D2": d2, "DV": dv, "DV2": dv2,
    }  # fmt: skip


def _kernel_constants(
    spec: Any, tile: tuning.Tile, tail: bool, mask: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    fold = _folds(spec)
    tf32 = spec.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return _constants(
        tile, spec.headdim, spec.headdim_v, spec.nheads // spec.nheads_k, spec.upper_left, fold,
        tail or spec.packed or spec.left is not None or spec.right is not None, spec.mask or spec.bias,
        (*_sides(mask), *_sides(bias)), tf32,
    )  # fmt: skip


def _slopes_stride(alibi_slopes: Tensor | None) -> int | None:
    return None if alibi_slopes is None else slopes_stride(alibi_slopes)


def _dropout(spec: Any, philox: Tensor | None) -> tuple[Any, ...]:
    return (None, None) if philox is None else dropout(spec)


def forward(
    spec: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
) -> None:
    tile = tuning.row_of(spec, q.device).fwd
    blocks_m = -(-spec.seqlen_q // tile.BLOCK_M)
    args = (
        q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox,
        *_strides(q), *_strides(k), *_strides(v), *_pair_strides(mask), *_pair_strides(bias),
        _slopes_stride(alibi_slopes), spec.nheads, spec.seqlen_q, spec.seqlen_k, blocks_m, lse.shape[-1],
        edge(spec.left, spec), edge(spec.right, spec), float(spec.scale), spec.softcap, *_dropout(spec, philox),
    )  # fmt: skip
    constants = _kernel_constants(spec, tile, spec.seqlen_k % tile.BLOCK_N != 0, mask, bias)
    grid = (blocks_m * spec.nheads * spec.batch,)
    launch.run(attention_fwd_kernel, grid, args, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _delta(spec: Any, do: Tensor, o: Tensor, dlse: Tensor | None, lse: Tensor, tile: tuning.Tile) -> Tensor:
    delta = torch.empty_like(lse)
    seqlen_q, heads = lse.shape[-1], lse.numel() // max(1, lse.shape[-1])
    dv, dv2 = tuning.split(spec.headdim_v)
    args = (do, o, dlse, delta, *_strides(do), *_strides(o), spec.nheads, seqlen_q)
    constants = {"HEADDIM_V": spec.headdim_v, "BLOCK_M": tile.BLOCK_M, "DV": dv, "DV2": dv2}
    launch.run(attention_bwd_delta_kernel, (-(-seqlen_q // tile.BLOCK_M), heads), args, constants)
    return delta


def backward(
    spec: Any,
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dsinks: Tensor | None,
) -> None:
    row = tuning.row_of(spec, q.device)
    lse = lse.contiguous()
    delta = _delta(spec, do, o, None if dlse is None else dlse.contiguous(), lse, row.dq)
    inputs = (q, k, v, do, lse, delta)
    packing = (cu_seqlens_q, cu_seqlens_k, philox)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(do))
    pairs = (*_pair_strides(mask), *_pair_strides(bias), _slopes_stride(alibi_slopes))
    band = (edge(spec.left, spec), edge(spec.right, spec))
    scores = (float(spec.scale), spec.softcap, *_dropout(spec, philox))

    full = _full_size(spec, dbias)
    tile = row.dq
    blocks_m = -(-spec.seqlen_q // tile.BLOCK_M)
    launch.run(
        attention_bwd_dq_kernel,
        (blocks_m * spec.nheads * spec.batch,),
        (
            *inputs, dq, full, mask, bias, alibi_slopes, *packing, *strides,
            *_pair_strides(full)[:3], *pairs, spec.nheads, spec.seqlen_q, spec.seqlen_k, blocks_m, lse.shape[-1],
            *band, *scores,
        ),
        _kernel_constants(spec, tile, spec.seqlen_k % tile.BLOCK_N != 0, mask, bias),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    tile = row.dkdv
    blocks_n = -(-spec.seqlen_k // tile.BLOCK_N)
    launch.run(
        attention_bwd_dkdv_kernel,
        (blocks_n * spec.nheads_k * spec.batch,),
        (
            *inputs, dk, dv, mask, bias, alibi_slopes, *packing, *strides, *pairs, spec.nheads_k, spec.seqlen_q,
            spec.seqlen_k, blocks_n, lse.shape[-1], *band, *scores,
        ),
        _kernel_constants(spec, tile, spec.seqlen_q % tile.BLOCK_M != 0, mask, bias),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if dbias is not None and full is None and dbias.numel() > 0:
        assert bias is not None
        found = _bias_sums(spec, row.dq, inputs, dbias, mask, bias, alibi_slopes, packing, strides, pairs, band, scores)
        dbias.copy_(found.sum_to_size(_four_sizes(dbias)).view(dbias.shape))
    if dsinks is not None:
        rows = (1, lse.shape[-1]) if spec.packed else (spec.batch, spec.seqlen_q)
        args = (lse, delta, sinks, dsinks, spec.nheads, rows[1], rows[0])
        launch.run(attention_bwd_dsinks_kernel, (spec.nheads,), args, {"BLOCK_M": 1024})


def _four_sizes(t: Tensor) -> tuple[int, ...]:
    return (*(1,) * (4 - t.dim()), *t.shape)


def _full_size(spec: Any, dbias: Tensor | None) -> Tensor | None:
    """dbias where no pair shares its entry with another, so that the dq kernel can write it."""
    if dbias is None:
        return None
    sizes = (spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)
    return dbias if _four_sizes(dbias) == sizes else None


def _bias_sums(
    spec: Any, tile: tuning.Tile, inputs: Any, dbias: Tensor, mask: Tensor | None, bias: Tensor,
    alibi_slopes: Tensor | None, packing: Any, strides: Any, pairs: Any, band: Any, scores: Any,
) -> Tensor:  # fmt: skip
    """The gradient of a bias that broadcasts. Where rows or columns are summed it is small, so heads and sequences are
    told apart for more programs at once, and the caller adds them up."""
    tile = tile._replace(BLOCK_M=min(tile.BLOCK_M, 64), BLOCK_N=min(tile.BLOCK_N, 32))  # one accumulator more than dq
    sizes = list(_four_sizes(dbias))
    rows, cols = _sides(bias)
    if not (rows and cols):
        sizes[:2] = spec.batch, spec.nheads
    found = dbias.new_zeros(sizes)
    blocks_m, blocks_n = -(-spec.seqlen_q // tile.BLOCK_M), -(-spec.seqlen_k // tile.BLOCK_N)
    grid = sizes[0] * sizes[1] * (blocks_m if rows else 1) * (blocks_n if cols else 1)
    constants = _kernel_constants(spec, tile, True, mask, bias)
    constants = {name: value for name, value in constants.items() if name not in ("FOLD", "MASKED", "WHOLE")}
    launch.run(
        attention_bwd_dbias_kernel,
        (grid,),
        (
            *inputs, found, mask, bias, alibi_slopes, *packing, *strides, *found.stride(), *pairs, spec.nheads,
            spec.seqlen_q, spec.seqlen_k, blocks_m, blocks_n, inputs[4].shape[-1], sizes[0], sizes[1], spec.batch,
            *band, *scores,
        ),
        constants,
        num_warps=tile.num_warps,
        num_stages=1,
    )  # fmt: skip
    return found


_WEIGHTS = (
    "GROUP", "HEADDIM", "UPPER_LEFT", "MASK_ROWS", "MASK_COLS", "BIAS_ROWS", "BIAS_COLS", "TF32", "BLOCK_M", "BLOCK_N",
    "D", "D2",
)  # fmt: skip


def weights(
    spec: Any,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
) -> None:
    tile = tuning.row_of(spec, q.device).dkdv
    blocks_m, blocks_n = -(-spec.seqlen_q // tile.BLOCK_M), -(-spec.seqlen_k // tile.BLOCK_N)
    args = (
        q, k, lse.contiguous(), mask, bias, alibi_slopes, out, *_strides(q), *_strides(k), *_pair_strides(mask),
        *_pair_strides(bias), _slopes_stride(alibi_slopes), spec.nheads, spec.seqlen_q, spec.seqlen_k, blocks_m,
        blocks_n, edge(spec.left, spec), edge(spec.right, spec), float(spec.scale), spec.softcap,
    )  # fmt: skip
    constants = _kernel_constants(spec, tile, True, mask, bias)
    grid = (blocks_m * blocks_n * spec.nheads * spec.batch,)
    constants = {name: constants[name] for name in _WEIGHTS}
    launch.run(attention_weights_kernel, grid, args, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)
