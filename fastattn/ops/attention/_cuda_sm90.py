"""The Hopper forward of the backend `cuda` (csrc/cuda/attention_fwd_sm90.cuh): what it takes, and its launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import tuning_sm90
from fastattn.ops.attention._arguments import SMALLEST_SCALE
from fastattn.ops.attention._cuda_hopper import L2_BYTES, TYPES, Box, box, flags, reachable
from fastattn.ops.attention._cuda_layout import Layout, OptionsLayout, forward_numbers, row_sizes
from fastattn.runtime import cuda

Tensor = torch.Tensor


def objections(spec: Any) -> list[str]:
    """Why the Hopper forward does not take such calls; a call's strides are the business of `plan`."""
    arch = cuda.arch(torch.device(spec.device))
    reasons = [f"a GPU of compute capability 9.0, got {arch / 10}"] if arch != 90 else []
    return reasons + _objections_of_kernel(spec)


def _objections_of_kernel(spec: Any) -> list[str]:
    reasons = []
    if spec.dtype not in TYPES:
        reasons.append(f"dtype bfloat16 or float16, got {spec.dtype}")
    if tuning_sm90.heads_of(spec.headdim, spec.headdim_v) is None or spec.headdim % 8 or spec.headdim_v % 8:
        widest, widest_v = tuning_sm90.HEADS[-1]
        wanted = f"headdim and headdim_v multiples of 8 up to {widest} and {widest_v}"
        reasons.append(f"{wanted}, got {spec.headdim} and {spec.headdim_v}")
    return reasons


class Road(NamedTuple):
    """How the kernel gets at a bias: element by element, or by TMA in tiles; there in rows where all queries share one."""

    tile: bool = False
    row: bool = False
    wide: bool = False  # of floats


def _road(spec: Any, options: OptionsLayout) -> Road:
    """By TMA where it can: keys next to each other, everything else at multiples of 16 bytes."""
    *over, over_keys = options.bias
    bytes_each = 4 if options.bias_float else 2
    tile = spec.bias and over_keys == 1 and options.bias_aligned and all(n * bytes_each % 16 == 0 for n in over)
    return Road(tile, over[2] == 0, bytes_each == 4) if tile else Road()


def _bias_box(spec: Any, options: OptionsLayout, road: Road, row: tuning_sm90.Row) -> Box:
    """(key, query, head, batch), 1 where it broadcasts, in boxes as BiasTile in csrc/cuda/tile/bias_sm90.cuh has them."""
    strides, each = options.bias[2::-1], 4 if road.wide else 2
    full = (spec.seqlen_q, spec.nheads, spec.batch)
    sizes = (spec.seqlen_k, *(size if stride else 1 for size, stride in zip(full, strides, strict=True)))
    steps = tuple(stride or 16 // each for stride in strides)
    if road.row:
        return sizes, steps, (row.BLOCK_N, 1, 1, 1), 0
    span = next(span for span in (128, 64, 32) if row.BLOCK_N * each % span == 0)
    return sizes, steps, (span // each, row.BLOCK_M, 1, 1), span


def _kernel(spec: Any, row: tuning_sm90.Row, road: Road) -> cuda.Kernel:
    general = spec.softcap is not None or spec.alibi or (spec.bias and not road.tile)
    general = general or (spec.scale < SMALLEST_SCALE and not spec.bias)
    pairs = flags(
        *(("kGeneral", general), ("kMask", spec.mask), ("kBias", spec.bias), ("kDropout", spec.dropout_p > 0)),
        *(("kTile", road.tile), ("kRow", road.row), ("kWide", road.wide)),
    )
    tile = (row.headdim, row.headdim_v, row.BLOCK_M, row.BLOCK_N, row.stages)
    constants = (TYPES[spec.dtype], *map(str, tile), row.flags, pairs)
    layout = ("attention_sm90_params.h", "AttentionSm90Params")
    name = ("attention_fwd_sm90.cuh", "attention_fwd_sm90_kernel")
    return cuda.kernel(*name, constants, layout, row.threads, row.shared, row.cluster, hopper=True)


def _heads_together(spec: Any, each: int) -> int:
    """So many heads of q, `each` of them a piece of work, that their keys and values stay in the L2 cache while all their queries
    pass."""
    of_one = max(1, spec.seqlen_k * (spec.headdim + spec.headdim_v) * 2)
    together = max(1, L2_BYTES // of_one) * (spec.nheads // spec.nheads_k)
    return min(together, spec.batch * spec.nheads) // each


class Plan(NamedTuple):
    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    q: Box
    o: Box
    k: Box
    v: Box
    bias: Box | None  # None: not by TMA
    counts: bool  # does the kernel draw its work from a counter?
    numbers: tuple[Any, ...]  # the fields of AttentionSm90Params behind the tensors


@functools.lru_cache(4096)
def plan(spec: Any, layout: Layout, sms: int, trial: tuple[tuning_sm90.Row, ...]) -> Plan | None:
    """strides: of q, k, v, o, lse; trial: `tuning_sm90.tried.rows`. None: the kernel for every GPU serves this call."""
    q, k, v, o, _ = layout.strides
    if _objections_of_kernel(spec) or not reachable(spec, layout, (q,), (k, v)):
        return None
    row = tuning_sm90.row_of(spec)
    road = _road(spec, layout.options)
    # the blocks of a cluster take two heads that share their keys, else as many queries more of one
    heads_each = row.cluster if spec.nheads // spec.nheads_k % row.cluster == 0 else 1
    blocks_m = -(-spec.seqlen_q // (row.BLOCK_M * row.cluster // heads_each))
    pieces = blocks_m * spec.nheads * spec.batch // heads_each
    hides = spec.packed or spec.mask or spec.bias or spec.left is not None or spec.right is not None
    rows_q, rows_k = row_sizes(spec, layout)
    loaded = row.BLOCK_N // row.cluster
    return Plan(
        _kernel(spec, row, road),
        (min(pieces, sms * row.blocks // row.cluster) * row.cluster, 1, 1),
        box(rows_q, spec.headdim, q, 64),
        box(rows_q, spec.headdim_v, o, 64),
        box(rows_k, spec.headdim, k, loaded),
        box(rows_k, spec.headdim_v, v, loaded),
        _bias_box(spec, layout.options, road, row) if road.tile else None,
        "dynamic" in row.ways,
        (
            *forward_numbers(spec, layout),
            pieces, blocks_m, _heads_together(spec, heads_each), heads_each, int(spec.right is not None), int(hides),
        ),
    )  # fmt: skip


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Tensor | None) -> None:
    """options: mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox."""
    bias, device = options[1], q.device
    k_map = cuda.TensorMap(k, *plan.k)
    values = (
        cuda.TensorMap(q, *plan.q), cuda.TensorMap(o, *plan.o), k_map, cuda.TensorMap(v, *plan.v),
        k_map if bias is None or plan.bias is None else cuda.TensorMap(bias, *plan.bias),
        q, k, v, o, lse, *options,
        torch.zeros(1, dtype=torch.int32, device=device) if plan.counts else None,
        *plan.numbers,
    )  # fmt: skip
    cuda.run(plan.kernel, plan.grid, values, device)
