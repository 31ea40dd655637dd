"""The Hopper forward of the backend `cuda` (csrc/cuda/attention_fwd_sm90.cuh): what it takes, and its launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import tuning_sm90
from fastattn.ops.attention._arguments import SMALLEST_SCALE, dropout, edge, pair_strides, slopes_stride, strides
from fastattn.runtime import cuda

Tensor = torch.Tensor
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_L2_BYTES = 32 << 20  # of the 50 MB: the rest is for q, o and what else runs
_NO_PAIRS = (0, 0, 0, 0)
_PANEL = 64  # columns of a box: 128 bytes, the span of its swizzle


def objections(spec: Any) -> list[str]:
    """Why the Hopper forward does not take such calls; a call's strides are the business of `takes`."""
    reasons = []
    arch = cuda.arch(torch.device(spec.device))
    if arch != 90:
        reasons.append(f"a GPU of compute capability 9.0, got {arch / 10}")
    if spec.dtype not in _TYPES:
        reasons.append(f"dtype bfloat16 or float16, got {spec.dtype}")
    if tuning_sm90.heads_of(spec.headdim, spec.headdim_v) is None or spec.headdim % 8 or spec.headdim_v % 8:
        widest, widest_v = tuning_sm90.HEADS[-1]
        wanted = f"headdim and headdim_v multiples of 8 up to {widest} and {widest_v}"
        reasons.append(f"{wanted}, got {spec.headdim} and {spec.headdim_v}")
    return reasons


def takes(spec: Any, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Does the Hopper forward serve this call? TMA wants rows at multiples of 16 bytes and no dimension expanded."""
    return _takes_spec(spec, cuda.arch(q.device)) and _reachable(q) and _reachable(k) and _reachable(v)


@functools.lru_cache(4096)
def _takes_spec(spec: Any, arch: int) -> bool:
    return not objections(spec)


def _reachable(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and _strides_reachable(t.shape, t.stride())


@functools.lru_cache(4096)
def _strides_reachable(sizes: tuple[int, ...], strides_of: tuple[int, ...]) -> bool:
    dimensions = zip(sizes[:-1], strides_of[:-1], strict=True)
    return 0 not in sizes and all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in dimensions)


def _map(t: Tensor, rows: int) -> cuda.TensorMap:
    """(headdim, seqlen, heads, batch) in boxes of `rows` rows and one panel of columns."""
    return cuda.TensorMap(t, *_mapped(t.shape, t.stride()), (_PANEL, rows, 1, 1), 128)


@functools.lru_cache(4096)
def _mapped(shape: tuple[int, ...], strides_of: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    *batch, seqlen, heads, headdim = shape
    *over_batch, over_rows, over_heads, _ = strides_of
    sizes = (headdim, seqlen, heads, batch[0] if batch else 1)
    # a dimension with one entry may have any stride; TMA wants a multiple of 16 bytes
    steps = zip(sizes[1:], (over_rows, over_heads, over_batch[0] if batch else 0), strict=True)
    return sizes, tuple(8 if size == 1 else step for size, step in steps)


class _Road(NamedTuple):
    """How the kernel gets at a bias: element by element, or by TMA in tiles; there in rows where all queries share one."""

    tile: bool = False
    row: bool = False
    wide: bool = False  # of floats


def _road(bias: Tensor | None) -> _Road:
    """By TMA where it can: keys next to each other, everything else at multiples of 16 bytes."""
    if bias is None:
        return _Road()
    *over, over_keys = pair_strides(bias)
    bytes_each = bias.element_size()
    tile = over_keys == 1 and all(n * bytes_each % 16 == 0 for n in over) and bias.data_ptr() % 16 == 0
    return _Road(tile, over[2] == 0, bytes_each == 4) if tile else _Road()


def _bias_map(bias: Tensor, spec: Any, road: _Road, row: tuning_sm90.Row) -> cuda.TensorMap:
    """(key, query, head, batch), 1 where it broadcasts, in boxes as BiasTile in csrc/cuda/tile/bias_sm90.cuh has them."""
    strides_of = pair_strides(bias)[2::-1]
    full = (spec.seqlen_q, spec.nheads, spec.batch)
    sizes = (bias.shape[-1], *(size if stride else 1 for size, stride in zip(full, strides_of, strict=True)))
    each = bias.element_size()
    steps = tuple(stride or 16 // each for stride in strides_of)
    if road.row:
        return cuda.TensorMap(bias, sizes, steps, (row.BLOCK_N, 1, 1, 1))
    span = next(span for span in (128, 64, 32) if row.BLOCK_N * each % span == 0)
    return cuda.TensorMap(bias, sizes, steps, (span // each, row.BLOCK_M, 1, 1), span)


def _pairs(spec: Any, road: _Road) -> str:
    """The template argument kPairs."""
    general = spec.softcap is not None or spec.alibi or (spec.bias and not road.tile)
    general = general or (spec.scale < SMALLEST_SCALE and not spec.bias)
    wanted = (
        *(("kGeneral", general), ("kMask", spec.mask), ("kBias", spec.bias), ("kDropout", spec.dropout_p > 0)),
        *(("kTile", road.tile), ("kRow", road.row), ("kWide", road.wide)),
    )
    return " | ".join(name for name, holds in wanted if holds) or "0"


def kernel(spec: Any, row: tuning_sm90.Row, road: _Road) -> cuda.Kernel:
    constants = (
        *(_TYPES[spec.dtype], str(row.headdim), str(row.headdim_v), str(row.BLOCK_M), str(row.BLOCK_N)),
        *(str(row.stages), row.flags, _pairs(spec, road)),
    )
    layout = ("attention_sm90_params.h", "AttentionSm90Params")
    name = ("attention_fwd_sm90.cuh", "attention_fwd_sm90_kernel")
    return cuda.kernel(*name, constants, layout, row.threads, row.shared, row.cluster, hopper=True)


def _heads_together(spec: Any, each: int) -> int:
    """So many heads of q, `each` of them a piece of work, that their keys and values stay in the L2 cache while all their queries
    pass."""
    of_one = max(1, spec.seqlen_k * (spec.headdim + spec.headdim_v) * 2)
    together = max(1, _L2_BYTES // of_one) * (spec.nheads // spec.nheads_k)
    return min(together, spec.batch * spec.nheads) // each


class _Plan(NamedTuple):
    row: tuning_sm90.Row
    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    sizes: tuple[Any, ...]
    scores: tuple[float, ...]


@functools.lru_cache(4096)
def _plan(spec: Any, row: tuning_sm90.Row, road: _Road, sms: int) -> _Plan:
    """All that follows from the call without its tensors, in the order of AttentionSm90Params."""
    # the blocks of a cluster take two heads that share their keys, else as many queries more of one
    heads_each = row.cluster if spec.nheads // spec.nheads_k % row.cluster == 0 else 1
    blocks_m = -(-spec.seqlen_q // (row.BLOCK_M * row.cluster // heads_each))
    pieces = blocks_m * spec.nheads * spec.batch // heads_each
    everything, left, right = spec.seqlen_q + spec.seqlen_k, edge(spec.left, spec), edge(spec.right, spec)
    hides = spec.packed or spec.mask or spec.bias or left is not None or right is not None
    return _Plan(
        row,
        kernel(spec, row, road),
        (min(pieces, sms * row.blocks // row.cluster) * row.cluster, 1, 1),
        (
            spec.batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.seqlen_q, spec.seqlen_k,
            everything if left is None else left, everything if right is None else right, int(spec.upper_left),
        ),
        (
            float(spec.scale), spec.softcap or 0.0, *dropout(spec),
            pieces, blocks_m, _heads_together(spec, heads_each), heads_each, int(right is not None), int(hides),
        ),
    )  # fmt: skip


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
    road = _road(bias)
    plan = _plan(spec, tuning_sm90.row_of(spec), road, cuda.sms(q.device))
    row = plan.row
    k_map = _map(k, row.BLOCK_N // row.cluster)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device) if "dynamic" in row.ways else None
    values = (
        _map(q, 64), _map(o, 64), k_map, _map(v, row.BLOCK_N // row.cluster),
        _bias_map(bias, spec, road, row) if bias is not None and road.tile else k_map,
        q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox, counter,
        *strides(q), *strides(k), *strides(v), *strides(o),
        0 if spec.packed else lse.stride(0), lse.stride(-2),
        *(_NO_PAIRS if mask is None else pair_strides(mask)), *(_NO_PAIRS if bias is None else pair_strides(bias)),
        0 if alibi_slopes is None else slopes_stride(alibi_slopes),
        *plan.sizes,
        int(bias is not None and bias.dtype == torch.float32), int(sinks is not None and sinks.dtype == torch.float32),
        *plan.scores,
    )  # fmt: skip
    cuda.run(plan.kernel, plan.grid, values, q.device)
