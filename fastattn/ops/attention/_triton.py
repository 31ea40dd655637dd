"""The backend `triton`: chooses tiles, gathers the arguments of a call and launches the kernels of `_triton_*.py`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import tuning
from fastattn.ops.attention._arguments import SMALLEST_SCALE, dropout, edge, pair_strides, slopes_stride, strides
from fastattn.ops.attention._triton_bias import attention_bwd_dbias_kernel, attention_bwd_dsinks_kernel
from fastattn.ops.attention._triton_bwd import attention_bwd_delta_kernel
from fastattn.ops.attention._triton_bwd_dkdv import attention_bwd_dkdv_kernel
from fastattn.ops.attention._triton_bwd_dq import attention_bwd_dq_kernel
from fastattn.ops.attention._triton_decode import kvcache as kvcache
from fastattn.ops.attention._triton_fwd import attention_fwd_kernel, attention_weights_kernel
from fastattn.runtime import launch

Tensor = torch.Tensor
_ABSENT = (None, None, None, None)
_SIDELESS = (False, False, False, False)


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


def _constants(spec: Any, tile: tuning.Tile, tail: bool, sides: tuple[bool, ...], tf32: bool) -> dict[str, Any]:
    """The constants that all kernels share. tail: can there be boundary tiles?"""
    d, d2 = tuning.split(spec.headdim)
    dv, dv2 = tuning.split(spec.headdim_v)
    names = ("MASK_ROWS", "MASK_COLS", "BIAS_ROWS", "BIAS_COLS")
    pairs = spec.mask or spec.bias  # then every tile is masked
    masked = tail or pairs or spec.packed or spec.left is not None or spec.right is not None
    whole = not pairs and not (masked and tile.ONE_WALK)
    return {
        "GROUP": spec.nheads // spec.nheads_k, "HEADDIM": spec.headdim, "HEADDIM_V": spec.headdim_v,
        "UPPER_LEFT": spec.upper_left, "FOLD": _folds(spec), "MASKED": masked, "WHOLE": whole,
        "ANEW": tile.ANEW, **dict(zip(names, sides, strict=True)), "TF32": tf32,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "D": d, "D2": d2, "DV": dv, "DV2": dv2,
    }  # fmt: skip


class _Plan(NamedTuple):
    """What follows from a call without its tensors: of a kernel's numbers, those after the strides and after lse's.

    works: of a persistent grid, the number of blocks
    """

    grid: tuple[int, ...]
    works: int | None
    sizes: tuple[int, ...]
    scores: tuple[float | None, ...]
    constants: dict[str, Any]


@functools.lru_cache(4096)
def _plan(spec: Any, tile: tuning.Tile, by_keys: bool, sides: tuple[bool, ...], tf32: bool, resident: int) -> _Plan:
    """For a kernel whose programs own a block of queries, or of keys; `resident` of them do all, or 0: one does one."""
    blocks = -(-spec.seqlen_k // tile.BLOCK_N) if by_keys else -(-spec.seqlen_q // tile.BLOCK_M)
    tail = spec.seqlen_q % tile.BLOCK_M if by_keys else spec.seqlen_k % tile.BLOCK_N
    heads = spec.nheads_k if by_keys else spec.nheads
    works = blocks * heads * spec.batch
    return _Plan(
        (min(works, resident or works),),
        works if resident else None,
        (heads, spec.seqlen_q, spec.seqlen_k, blocks),
        (
            edge(spec.left, spec), edge(spec.right, spec), float(spec.scale), _float(spec.softcap),
            *(dropout(spec) if spec.dropout_p else (None, None)),
        ),
        _constants(spec, tile, tail != 0, sides, tf32),
    )  # fmt: skip


def _plan_of(spec: Any, tile: tuning.Tile, by_keys: bool, mask: Tensor | None, bias: Tensor | None) -> _Plan:
    sides = _SIDELESS if mask is None and bias is None else (*_sides(mask), *_sides(bias))
    resident = tile.RESIDENT and tile.RESIDENT * launch.sms(torch.device(spec.device))
    return _plan(spec, tile, by_keys, sides, _tf32(spec), resident)


def _tf32(spec: Any) -> bool:
    return spec.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32


def _float(number: float | None) -> float | None:
    """An integer would compile to another kernel, and be the same key."""
    return None if number is None else float(number)


def _slopes_stride(alibi_slopes: Tensor | None) -> int | None:
    return None if alibi_slopes is None else slopes_stride(alibi_slopes)


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
    plan = _plan_of(spec, tile, False, mask, bias)
    tensors = (
        q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox if spec.dropout_p else None
    )  # fmt: skip
    numbers = (
        *strides(q), *strides(k), *strides(v), *_pair_strides(mask), *_pair_strides(bias),
        _slopes_stride(alibi_slopes), *plan.sizes, lse.shape[-1], *plan.scores, plan.works,
    )  # fmt: skip
    launch.run(
        attention_fwd_kernel, plan.grid, tensors, numbers, plan.constants, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip


@functools.cache
def _delta_constants(headdim_v: int, block: int) -> dict[str, Any]:
    dv, dv2 = tuning.split(headdim_v)
    return {"HEADDIM_V": headdim_v, "BLOCK_M": block, "DV": dv, "DV2": dv2}


def _delta(spec: Any, do: Tensor, o: Tensor, dlse: Tensor | None, lse: Tensor, tile: tuning.Tile) -> Tensor:
    delta = torch.empty_like(lse)
    seqlen_q, heads = lse.shape[-1], spec.nheads if spec.packed else spec.nheads * spec.batch
    block = min(tile.BLOCK_M, 64)  # 128 padded rows of both tiles do not fit into the registers of 4 warps
    launch.run(
        attention_bwd_delta_kernel,
        (-(-seqlen_q // block) * heads,),
        (do, o, dlse, delta),
        (*strides(do), *strides(o), spec.nheads, seqlen_q),
        _delta_constants(spec.headdim_v, block),
    )
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
    options = (mask, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, philox if spec.dropout_p else None)
    places = (*strides(q), *strides(k), *strides(v), *strides(do))
    pairs = (*_pair_strides(mask), *_pair_strides(bias), _slopes_stride(alibi_slopes))

    full = _full_size(spec, dbias)
    tile = row.dq
    plan = _plan_of(spec, tile, False, mask, bias)
    launch.run(
        attention_bwd_dq_kernel,
        plan.grid,
        (*inputs, dq, full, *options),
        (*places, *_pair_strides(full)[:3], *pairs, *plan.sizes, lse.shape[-1], *plan.scores, plan.works),
        plan.constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    tile = row.dkdv
    plan = _plan_of(spec, tile, True, mask, bias)
    launch.run(
        attention_bwd_dkdv_kernel,
        plan.grid,
        (*inputs, dk, dv, *options),
        (*places, *pairs, *plan.sizes, lse.shape[-1], *plan.scores, plan.works),
        plan.constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if dbias is not None and full is None and dbias.numel() > 0:
        assert bias is not None
        found = _bias_sums(spec, row.dq, inputs, dbias, options, (*places, *pairs), plan.scores)
        dbias.copy_(found.sum_to_size(_four_sizes(dbias)).view(dbias.shape))
    if dsinks is not None:
        rows = (1, lse.shape[-1]) if spec.packed else (spec.batch, spec.seqlen_q)
        tensors, numbers = (lse, delta, sinks, dsinks), (spec.nheads, rows[1], rows[0])
        launch.run(attention_bwd_dsinks_kernel, (spec.nheads,), tensors, numbers, {"BLOCK_M": 1024})


def _four_sizes(t: Tensor) -> tuple[int, ...]:
    return (*(1,) * (4 - t.dim()), *t.shape)


def _full_size(spec: Any, dbias: Tensor | None) -> Tensor | None:
    """dbias where no pair shares its entry with another, so that the dq kernel can write it."""
    if dbias is None:
        return None
    sizes = (spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)
    return dbias if _four_sizes(dbias) == sizes else None


def _bias_sums(
    spec: Any, tile: tuning.Tile, inputs: Any, dbias: Tensor, options: Any, places: tuple[Any, ...], scores: Any
) -> Tensor:
    """The gradient of a bias that broadcasts. Where rows or columns are summed it is small, so heads and sequences are
    told apart for more programs at once, and the caller adds them up."""
    tile = tile._replace(BLOCK_M=min(tile.BLOCK_M, 64), BLOCK_N=min(tile.BLOCK_N, 32))  # one accumulator more than dq
    mask, bias, *_ = options
    sizes = list(_four_sizes(dbias))
    rows, cols = _sides(bias)
    if not (rows and cols):
        sizes[:2] = spec.batch, spec.nheads
    found = dbias.new_zeros(sizes)
    blocks_m, blocks_n = -(-spec.seqlen_q // tile.BLOCK_M), -(-spec.seqlen_k // tile.BLOCK_N)
    constants = _constants(spec, tile, True, (*_sides(mask), rows, cols), _tf32(spec))
    launch.run(
        attention_bwd_dbias_kernel,
        (sizes[0] * sizes[1] * (blocks_m if rows else 1) * (blocks_n if cols else 1),),
        (*inputs, found, *options),
        (
            *places[:12], *found.stride(), *places[12:], spec.nheads, spec.seqlen_q, spec.seqlen_k, blocks_m, blocks_n,
            inputs[4].shape[-1], sizes[0], sizes[1], spec.batch, *scores,
        ),
        {name: value for name, value in constants.items() if name not in ("FOLD", "MASKED", "WHOLE", "ANEW")},
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
    plan = _plan_of(spec, tile, True, mask, bias)
    launch.run(
        attention_weights_kernel,
        (blocks_m * blocks_n * spec.nheads * spec.batch,),
        (q, k, lse.contiguous(), mask, bias, alibi_slopes, out),
        (
            *strides(q), *strides(k), *_pair_strides(mask), *_pair_strides(bias), _slopes_stride(alibi_slopes), spec.nheads,
            spec.seqlen_q, spec.seqlen_k, blocks_m, blocks_n, *plan.scores[:4],
        ),
        {name: plan.constants[name] for name in _WEIGHTS},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
