"""The Hopper backward of the backend `cuda` (csrc/cuda/attention_bwd_sm90.cuh): what it takes, and its launches."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention._arguments import edges
from fastattn.ops.attention._cuda_hopper import L2_BYTES, TYPES, Box, box, flags, reachable
from fastattn.ops.attention._cuda_layout import BwdTensors, Layout, row_sizes, row_strides, scores
from fastattn.ops.attention.tuning_sm90_bwd import WAYS, Row, find, kind_of, row_of
from fastattn.runtime import cuda

Tensor = torch.Tensor
_LAYOUT = ("attention_bwd_sm90_params.h", "AttentionBwdSm90Params")


def objections(spec: Any) -> list[str]:
    """Why the Hopper backward does not take a call; a call's strides are the business of `plan`."""
    reasons = []
    if spec.dtype not in TYPES:
        reasons.append(f"dtype bfloat16 or float16, got {spec.dtype}")
    if find(spec.headdim, spec.headdim_v, kind_of(spec)) is None or spec.headdim % 8 or spec.headdim_v % 8:
        reasons.append(f"headdim and headdim_v up to 256, multiples of 8, got {spec.headdim}, {spec.headdim_v}")
    return reasons


def kernel(spec: Any, row: Row) -> cuda.Kernel:
    general = spec.softcap is not None or spec.alibi
    pairs = (("kGeneral", general), ("kMask", spec.mask), ("kBias", spec.bias), ("kDropout", spec.dropout_p > 0))
    ways = ((f"k{way.title()}", way in row.ways) for way in WAYS if way != "ordered")
    tile = (row.headdim, row.headdim_v, row.BLOCK_M, row.BLOCK_N)
    constants = (TYPES[spec.dtype], *map(str, tile), flags(*ways), flags(*pairs))
    name = ("attention_bwd_sm90.cuh", "attention_bwd_sm90_kernel")
    return cuda.kernel(*name, constants, _LAYOUT, 128 * (1 + row.consumers), row.shared, hopper=True)


def dq_kernel(spec: Any, row: Row) -> cuda.Kernel:
    constants = (TYPES[spec.dtype], str(row.headdim), str(row.BLOCK_M))
    return cuda.kernel(
        "attention_bwd_sm90_dq.cuh", "attention_bwd_sm90_dq_kernel", constants, _LAYOUT, 128, 2 * 64 * 64
    )


def _heads_together(spec: Any, row: Row, blocks_n: int, sms: int) -> int:
    """So many heads of k at a time. In any order: few enough that their q, dout and sums of dq stay in the L2 cache. In turns:
    enough that at most eight blocks of keys of one head run at once, since each starts a tile behind the one before it."""
    heads = spec.batch * spec.nheads_k
    if "ordered" in row.ways:
        return min(heads, max(1, sms // min(8, blocks_n)))
    group = spec.nheads // spec.nheads_k
    of_one = spec.seqlen_q * group * (2 * (spec.headdim + spec.headdim_v) + 4 * row.headdim)
    return min(heads, max(1, L2_BYTES // max(1, of_one)))


class Plan(NamedTuple):
    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    dq_kernel: cuda.Kernel
    dq_grid: tuple[int, int, int]
    q: Box
    do: Box
    k: Box
    v: Box
    sums: int  # floats of dq_sums
    counters: int  # the one of works drawn, if there is one, and those of turns
    in_turns: bool
    numbers: tuple[Any, ...]  # the fields of AttentionBwdSm90Params behind the tensors


@functools.lru_cache(4096)
def plan(spec: Any, layout: Layout, sms: int, trial: tuple[Row, ...]) -> Plan | None:
    """strides: of q, k, v, o, do, dq, dk, dv; trial: `tried.rows`. None: the kernels for every GPU serve this call."""
    q, k, v, _, do, dq, dk, dv, *_ = layout.strides
    if objections(spec) or not reachable(spec, layout, (q, do), (k, v)):
        return None
    row = row_of(spec)
    rows_q, rows_k = row_sizes(spec, layout)
    total_q = layout.totals[0]
    per_head = total_q // row.BLOCK_M + spec.batch if spec.packed else -(-spec.seqlen_q // row.BLOCK_M)
    tiles = per_head * spec.nheads * (1 if spec.packed else spec.batch)
    in_turns, persistent = "ordered" in row.ways, "persistent" in row.ways
    blocks_n, blocks_m = -(-spec.seqlen_k // row.BLOCK_N), -(-spec.seqlen_q // row.BLOCK_M)
    works = blocks_n * spec.nheads_k * spec.batch
    options = layout.options
    full = (spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)  # a smaller dbias has a kernel of its own
    dbias = layout.dbias[1] if layout.dbias is not None and layout.dbias[0] == full else (0, 0, 0, 0)
    numbers = (
        *(stride for strides in (q, k, v, do, dq, dk, dv) for stride in row_strides(strides)),
        *((0, total_q) if spec.packed else (spec.nheads * spec.seqlen_q, spec.seqlen_q)),
        *options.mask, *options.bias, *dbias, options.alibi,
        spec.batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.seqlen_q, spec.seqlen_k,
        *edges(spec), int(spec.upper_left), options.bias_float, *scores(spec),
        per_head, blocks_n, _heads_together(spec, row, blocks_n, sms),
    )  # fmt: skip
    return Plan(
        kernel(spec, row),
        (min(works, sms) if persistent else works, 1, 1),
        dq_kernel(spec, row),
        (blocks_m * spec.nheads * spec.batch, 1, 1),
        box(rows_q, spec.headdim, q, row.BLOCK_M),
        box(rows_q, spec.headdim_v, do, row.BLOCK_M),
        box(rows_k, spec.headdim, k, row.BLOCK_N),
        box(rows_k, spec.headdim_v, v, row.BLOCK_N),
        tiles * row.tile,
        (1 if in_turns or persistent else 0) + (row.parts * tiles if in_turns else 0),
        in_turns,
        numbers,
    )


def gradients(plan: Plan, t: BwdTensors) -> None:
    """dq, dk, dv, and a dbias as large as the scores, from what the delta kernel prepared: dq_turns are all counters."""
    values = (
        cuda.TensorMap(t.q, *plan.q), cuda.TensorMap(t.do, *plan.do), cuda.TensorMap(t.k, *plan.k), cuda.TensorMap(t.v, *plan.v),
        t.q, t.k, t.v, t.do, t.lse_log2, t.delta, t.dq_sums,
        t.dq_turns, t.dq_turns[1:] if t.dq_turns is not None and plan.in_turns else None,
        t.dq, t.dk, t.dv, t.dbias, t.mask, t.bias, t.alibi_slopes, t.cu_seqlens_q, t.cu_seqlens_k, t.philox,
        *plan.numbers,
    )  # fmt: skip
    cuda.run(plan.kernel, plan.grid, values, t.q.device)
    cuda.run(plan.dq_kernel, plan.dq_grid, values, t.q.device)
