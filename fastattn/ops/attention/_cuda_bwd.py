"""The backward of the backend `cuda`: chooses tiles, fills AttentionBwdParams and launches csrc/cuda/attention_bwd_*.cuh."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import _cuda_bwd_sm90, tuning_cuda, tuning_cuda_bwd, tuning_sm90_bwd
from fastattn.ops.attention._arguments import edges
from fastattn.ops.attention._cuda_layout import (
    BwdTensors,
    Ints,
    Layout,
    options_layout,
    pair_layout,
    row_sizes,
    row_strides,
    rows_aligned,
    scores,
    statistics_strides,
)
from fastattn.ops.attention.tuning_cuda_bwd import Dq, Row, row_of, tells_pairs
from fastattn.runtime import cuda

Tensor = torch.Tensor
_LAYOUT = ("attention_bwd_params.h", "AttentionBwdParams")
_SUMS = 160  # bytes of SumScratch<1>
_NO_BIAS = (1, 1, 1, 1), (0, 0, 0, 0)
_DBIAS = (64, 32)  # BLOCK_M, BLOCK_N of the kernel for a bias that broadcasts


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
    device = q.device
    layout = Layout(
        (
            *(q.stride(), k.stride(), v.stride(), o.stride(), do.stride(), dq.stride(), dk.stride(), dv.stride()),
            *(lse.stride(), () if dlse is None else dlse.stride()),
        ),
        (q.shape[0], k.shape[0]),
        not (q.data_ptr() | k.data_ptr() | v.data_ptr() | o.data_ptr() | do.data_ptr()) & 15,
        options_layout(mask, bias, alibi_slopes, sinks),
        pair_layout(dbias),
    )
    trial = tuning_cuda_bwd.tried.rows, tuning_sm90_bwd.tried.rows
    plan = _plan(spec, layout, cuda.arch(device), cuda.sms(device), cuda.hopper(device), trial)
    turns, sums, lse_log2, delta = lse.new_empty(sum(plan.scratch)).split_with_sizes(plan.scratch)
    tensors = BwdTensors(
        q, k, v, o, do, lse, dlse, lse_log2, delta, dq, sums, turns if plan.scratch[0] else None, dk, dv,
        dbias if plan.dbias is None else None, dsinks,
        mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox,
    )  # fmt: skip
    _run(plan.delta, tensors)
    if plan.hopper is None:
        _run(plan.dkdv, tensors)
        _run(plan.dq, tensors)
    else:
        _cuda_bwd_sm90.gradients(plan.hopper, tensors)
    if dbias is not None and plan.dbias is not None:
        found = dbias.new_zeros(plan.dbias_written)
        _run(plan.dbias, tensors._replace(dbias=found))
        dbias.copy_(found.sum_to_size(plan.dbias_left).view(dbias.shape))
    if dsinks is not None:
        _run(plan.dsinks, tensors)


def _run(launch: _Launch, tensors: BwdTensors) -> None:
    cuda.run(launch.kernel, launch.grid, (*tensors, *launch.numbers), tensors.q.device)


class _Launch(NamedTuple):
    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    numbers: tuple[Any, ...]  # the fields of AttentionBwdParams behind the tensors


class _Plan(NamedTuple):
    """The last three: where a bias broadcasts, the launch that sums its gradient over queries or keys, the sizes of what that
    writes, and of what is left after summing over sequences and heads."""

    scratch: Ints  # floats: turns, sums of dq, lse_log2, delta
    delta: _Launch
    dkdv: _Launch
    dq: _Launch
    hopper: _cuda_bwd_sm90.Plan | None  # in the place of dkdv and dq
    dsinks: _Launch
    dbias: _Launch | None
    dbias_written: Ints
    dbias_left: Ints


@functools.lru_cache(4096)
def _plan(spec: Any, layout: Layout, arch: int, sms: int, hopper: bool, trial: tuple[Any, Any]) -> _Plan:
    """strides: of q, k, v, o, do, dq, dk, dv, lse, dlse; trial: the rows tried of both backwards."""
    row = row_of(spec, arch)
    q, k, v, o, do = layout.strides[:5]
    rows_q, rows_k = row_sizes(spec, layout)
    read = (rows_q, q), (rows_q, o), (rows_q, do), (rows_k, k), (rows_k, v)
    aligned = layout.aligned and all(rows_aligned(sizes, strides) for sizes, strides in read)
    kernels = _kernels(spec.dtype, spec.headdim, spec.headdim_v, row, aligned, tells_pairs(spec))
    whole = (spec.batch, spec.seqlen_q)
    flat = (1, layout.totals[0]) if spec.packed else whole  # for what looks at queries alone
    statistics = flat[0] * spec.nheads * flat[1]
    on_hopper = _cuda_bwd_sm90.plan(spec, layout, sms, trial[1]) if hopper else None
    if on_hopper is None:
        sums = _sums(spec, layout, row, sms, statistics > 0)
    else:
        sums = _Sums(on_hopper.counters, on_hopper.sums, on_hopper.sums)

    def launch(kernel: cuda.Kernel, blocks: int, *rows: Any) -> _Launch:
        return _Launch(kernel, (blocks, 1, 1), _numbers(spec, layout, sums, *rows))

    dbias = None if layout.dbias is None else layout.dbias[0]
    full = dbias == (spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)
    of_bias: _Launch | None = None
    written: Ints = ()
    if dbias is not None and not full and 0 not in dbias:
        # where queries or keys are summed it is small: heads and sequences are told apart for more blocks at once
        written = dbias if min(dbias[2:]) > 1 else (spec.batch, spec.nheads, *dbias[2:])
        of_bias = launch(kernels.dbias, _blocks_of_bias(spec, written), *whole, (written, _contiguous(written)))
    blocks_n = _blocks(spec.seqlen_k, row.dkdv.BLOCK_N)
    blocks_m = _blocks(spec.seqlen_q, row.dq.BLOCK_M if isinstance(row.dq, Dq) else row.dkdv.BLOCK_M)
    return _Plan(
        (_blocks(sums.turns, 32) * 32, sums.floats, statistics, statistics),
        launch(kernels.delta, _blocks(flat[1], 32) * spec.nheads * flat[0], *flat),
        launch(kernels.dkdv, blocks_n * spec.nheads_k * spec.batch, *whole, layout.dbias if full else None),
        launch(kernels.dq, blocks_m * spec.nheads * spec.batch, *whole, layout.dbias if full else None),
        on_hopper,
        launch(kernels.dsinks, spec.nheads, *flat),
        of_bias,
        written,
        dbias or (),
    )


def _numbers(
    spec: Any, layout: Layout, sums: _Sums, batch: int, seqlen_q: int, dbias: tuple[Ints, Ints] | None = None
) -> tuple[Any, ...]:
    """The fields of AttentionBwdParams behind the tensors. dbias: the sizes and strides of what a launch writes."""
    *rows, lse, dlse = layout.strides
    options = layout.options
    dbias_sizes, dbias_strides = _NO_BIAS if dbias is None else dbias
    return (
        *(stride for strides in rows for stride in row_strides(strides)), *statistics_strides(lse), *statistics_strides(dlse),
        *((0, layout.totals[0]) if spec.packed else (spec.nheads * spec.seqlen_q, spec.seqlen_q)),
        *options.mask, *options.bias, *dbias_strides, options.alibi, sums.turns, sums.zeros,
        batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, seqlen_q, spec.seqlen_k, *edges(spec),
        int(spec.upper_left), options.bias_float, options.sinks_float, *dbias_sizes[:2], *(int(n > 1) for n in dbias_sizes[2:]),
        sums.tiles, sums.heads_together, *scores(spec),
    )  # fmt: skip


class _Sums(NamedTuple):
    """What dq is added up in: so many numbers of turns and so many floats, of which the delta kernel makes some 0; then
    AttentionBwdParams' dq_tiles and heads_together."""

    turns: int = 0
    floats: int = 0
    zeros: int = 0
    tiles: int = 0
    heads_together: int = 1


def _sums(spec: Any, layout: Layout, row: Row, sms: int, queries: bool) -> _Sums:
    """In turns at most eight blocks of keys of one head run at once, since each starts a tile behind the one before it; in any
    order one head runs after the other, for the L2 cache. Without queries there are no turns."""
    if not row.adds_dq:
        return _Sums()
    block_m, block_n = row.dkdv[:2]
    d, _ = tuning_cuda.widths(spec.headdim, spec.headdim_v)
    per_head = layout.totals[0] // block_m + spec.batch if spec.packed else _blocks(spec.seqlen_q, block_m)
    tiles = per_head * spec.nheads * (1 if spec.packed else spec.batch)
    floats = tiles * block_m * d
    if row.dq == "unordered" or not queries:
        return _Sums(0, floats, floats, per_head)
    side_by_side = max(1, min(8, _blocks(spec.seqlen_k, block_n)))
    at_once = sms * 256 // row.dkdv.threads  # eight warps share a multiprocessor
    heads = max(1, min(spec.batch * spec.nheads_k, at_once // side_by_side))
    return _Sums(1 + tiles, floats, 0, per_head, heads)


class _Kernels(NamedTuple):
    """What a backward launches, the last two where their gradients are asked for. dq: computes it, or rounds its sums."""

    delta: cuda.Kernel
    dkdv: cuda.Kernel
    dq: cuda.Kernel
    dbias: cuda.Kernel
    dsinks: cuda.Kernel


@functools.cache
def _kernels(dtype: torch.dtype, headdim: int, headdim_v: int, row: Row, aligned: bool, pairs: bool) -> _Kernels:
    d, dv = tuning_cuda.widths(headdim, headdim_v)

    def kernel(name: str, file: str, constants: tuple[Any, ...], threads: int, shared: int = 0) -> cuda.Kernel:
        texts = (cuda.TYPES[dtype], *(str(c).lower() for c in constants))
        return cuda.kernel(f"attention_bwd_{file}.cuh", f"attention_bwd_{name}_kernel", texts, _LAYOUT, threads, shared)

    block_m, block_n = _DBIAS
    dkdv = (d, dv, *row.dkdv, aligned, pairs, row.adds_dq)
    if isinstance(row.dq, Dq):
        dq = kernel("dq", "dq", (d, dv, *row.dq, aligned, pairs), row.dq.threads, row.dq.shared(d, dv))
    else:
        dq = kernel("dq_sums", "dq_sums", (d, row.dkdv.BLOCK_M), 128, 2 * d * row.dkdv.BLOCK_M)
    return _Kernels(
        kernel("delta", "delta", (aligned,), 256),
        kernel("dkdv", "dkdv", dkdv, row.dkdv.threads, row.dkdv.shared(d, dv, row.adds_dq)),
        dq,
        kernel(
            "dbias", "dbias", (d, dv, *_DBIAS, aligned), 2 * block_m,
            2 * (d + dv) * (block_m + block_n) + block_m * block_n // 4,
        ),
        kernel("dsinks", "delta", (), 256, _SUMS),
    )  # fmt: skip


def _blocks_of_bias(spec: Any, written: Ints) -> int:
    blocks_m, blocks_n = _blocks(spec.seqlen_q, _DBIAS[0]), _blocks(spec.seqlen_k, _DBIAS[1])
    return written[0] * written[1] * (blocks_m if written[2] > 1 else 1) * (blocks_n if written[3] > 1 else 1)


def _contiguous(sizes: Ints) -> Ints:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def _blocks(rows: int, block: int) -> int:
    return -(-rows // block)
