"""The backward of the backend `cuda`: chooses tiles, fills AttentionBwdParams and launches csrc/cuda/attention_bwd_*.cuh."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import _cuda_bwd_sm90, tuning_cuda
from fastattn.ops.attention._arguments import (
    dropout,
    edges,
    is_float,
    pair_strides,
    rows_aligned,
    slopes_stride,
    strides,
)
from fastattn.runtime import cuda, gpu

Tensor = torch.Tensor
_LAYOUT = ("attention_bwd_params.h", "AttentionBwdParams")
_BLOCK, _BLOCK_OF_KEYS = 80, 112  # bytes of shared memory behind the tiles
_SUMS = 160  # bytes of SumScratch<1>
_DBIAS = (64, 32)  # BLOCK_M, BLOCK_N of the kernel for a bias that broadcasts


class Dkdv(NamedTuple):
    """BLOCK_M queries at a time against BLOCK_N keys; warps over keys, and over halves of the head."""

    BLOCK_M: int
    BLOCK_N: int
    warps_n: int
    warps_d: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_d

    def registers(self, d: int, dv: int) -> int:
        """Of a thread for dk, dv, scores and their gradients."""
        return self.BLOCK_N * (d + dv + 2 * self.BLOCK_M) // self.threads

    def divides(self, d: int) -> bool:
        """Has every warp a part of dq's tile, of 32 or 16 rows and some 16 columns, as the kernel cuts it?"""
        warps, columns = self.warps_n * self.warps_d, d // 16
        across = 32 * warps // self.BLOCK_M
        below = self.BLOCK_M // (32 if across and columns % across == 0 else 16)
        return warps % below == 0 and columns * below % warps == 0

    def shared(self, d: int, dv: int, adds_dq: bool) -> int:
        exchanged = self.warps_d if adds_dq or self.warps_d > 1 else 0  # P and dS, dS, or neither
        exchange = 2 * self.BLOCK_M * self.BLOCK_N * exchanged
        return 2 * (d + dv) * (self.BLOCK_N + 2 * self.BLOCK_M) + exchange + 16 * self.BLOCK_M + _BLOCK_OF_KEYS


class Dq(NamedTuple):
    """BLOCK_M queries against BLOCK_N keys at a time; warps over queries."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared(self, d: int, dv: int) -> int:
        return 2 * (d + dv) * (self.BLOCK_M + 2 * self.BLOCK_N) + _BLOCK


class Row(NamedTuple):
    """Tiles for GPUs with `shared` KB of shared memory per block, head dimensions (the larger of q's and v's) up to
    `headdim`, and calls with (pairs) or without an option that tells single pairs apart.

    dq  the tile of its own kernel, or how the kernel of dk and dv adds it up: "ordered", in one order, so that equal inputs
        give equal bits, or "unordered"
    """

    shared: int
    headdim: int
    pairs: bool
    dkdv: Dkdv
    dq: Dq | str

    @property
    def adds_dq(self) -> bool:
        return isinstance(self.dq, str)

    def fits(self, limit: int, d: int, dv: int) -> bool:
        """In so many bytes of shared memory, and can the warps share dq evenly?"""
        if isinstance(self.dq, Dq):
            return max(self.dkdv.shared(d, dv, False), self.dq.shared(d, dv)) <= limit
        return self.dkdv.shared(d, dv, True) <= limit and self.dkdv.divides(d)

    def __str__(self) -> str:
        return f"dkdv {self.dkdv}, dq {self.dq} ({ANALYSIS})"


ANALYSIS = "by analysis: registers, spills, shared memory and its traffic; not measured"
ROWS = (
    Row(99, 32, False, Dkdv(32, 128, 4, 1), "ordered"),
    Row(99, 64, False, Dkdv(64, 128, 4, 2), "ordered"),
    Row(99, 96, False, Dkdv(32, 128, 8, 1), Dq(128, 32, 4)),
    Row(99, 128, False, Dkdv(32, 128, 8, 1), Dq(128, 32, 4)),
    Row(99, 192, False, Dkdv(32, 32, 2, 2), Dq(64, 32, 4)),
    Row(99, 256, False, Dkdv(32, 16, 1, 2), Dq(32, 32, 2)),
    Row(99, 32, True, Dkdv(32, 64, 4, 1), "ordered"),
    Row(99, 64, True, Dkdv(32, 128, 8, 1), "ordered"),
    Row(99, 128, True, Dkdv(32, 64, 4, 1), Dq(64, 32, 4)),
    Row(99, 192, True, Dkdv(32, 32, 2, 2), Dq(64, 32, 4)),
    Row(99, 256, True, Dkdv(32, 16, 1, 2), Dq(32, 32, 2)),
    Row(163, 64, False, Dkdv(32, 128, 4, 1), "ordered"),
    Row(163, 96, False, Dkdv(64, 128, 4, 2), "ordered"),
    Row(163, 128, False, Dkdv(64, 128, 4, 2), "ordered"),
    Row(163, 192, False, Dkdv(64, 64, 4, 2), "ordered"),
    Row(163, 256, False, Dkdv(32, 64, 4, 2), "ordered"),
    Row(163, 96, True, Dkdv(32, 128, 8, 1), Dq(128, 32, 8)),
    Row(163, 128, True, Dkdv(32, 128, 8, 1), "ordered"),
    Row(163, 192, True, Dkdv(32, 64, 4, 2), "ordered"),
    Row(163, 256, True, Dkdv(32, 64, 4, 2), "ordered"),
)
# What has a kernel of its own for dq, where ROWS have one for all: to time against them.
SEPARATE = (
    Row(99, 32, False, Dkdv(32, 128, 4, 1), Dq(128, 64, 4)),
    Row(99, 64, False, Dkdv(32, 128, 4, 1), Dq(128, 32, 4)),
    Row(99, 64, True, Dkdv(32, 128, 8, 1), Dq(128, 32, 8)),
    Row(163, 96, False, Dkdv(64, 128, 4, 2), Dq(128, 32, 4)),
    Row(163, 128, False, Dkdv(64, 128, 4, 2), Dq(256, 32, 8)),
    Row(163, 192, False, Dkdv(64, 64, 4, 2), Dq(128, 32, 8)),
    Row(163, 256, False, Dkdv(32, 64, 4, 2), Dq(64, 32, 4)),
    Row(163, 128, True, Dkdv(32, 128, 8, 1), Dq(128, 32, 8)),
    Row(163, 192, True, Dkdv(32, 64, 4, 2), Dq(128, 32, 8)),
    Row(163, 256, True, Dkdv(32, 64, 4, 2), Dq(64, 32, 4)),
    Row(227, 128, False, Dkdv(64, 128, 4, 2), Dq(128, 32, 4)),
    Row(227, 256, False, Dkdv(64, 64, 4, 2), Dq(128, 32, 8)),
    Row(227, 256, True, Dkdv(32, 64, 4, 2), Dq(128, 32, 8)),
)
# Other tiles to try for the kernel that adds dq up.
_TILES = (Dkdv(32, 64, 2, 2), Dkdv(32, 128, 4, 1), Dkdv(32, 128, 4, 2), Dkdv(64, 128, 4, 2), Dkdv(128, 128, 4, 2))


@functools.cache
def find(arch: int, headdim: int, pairs: bool) -> Row:
    """The row that fits the shared memory and the head most closely."""
    return _closest(ROWS, arch, headdim, pairs)


def _closest(rows: tuple[Row, ...], arch: int, headdim: int, pairs: bool) -> Row:
    limit = gpu.shared_limit(arch) >> 10
    fits = [r for r in rows if r.shared <= limit and r.headdim >= headdim and r.pairs == pairs]
    return min(fits, key=lambda r: (r.headdim, -r.shared))


_trial: Row | None = None


@contextlib.contextmanager
def tried(row: Row) -> Iterator[None]:
    """Within the block every call uses `row`, which must cover its heads and kind; where bits must not differ, in order."""
    global _trial
    before, _trial = _trial, row
    try:
        yield
    finally:
        _trial = before


def candidates(arch: int, headdim: int, pairs: bool) -> list[Row]:
    """The rows to time against each other, today's first. What the compiler makes of new tiles is for the audit to say."""
    first = _closest(ROWS, arch, headdim, pairs)
    apart = _closest((*SEPARATE, *(row for row in ROWS if not row.adds_dq)), arch, headdim, pairs)
    tiles = dict.fromkeys((first.dkdv, apart.dkdv, *_TILES))
    together = [first._replace(dkdv=tile, dq=way) for tile in tiles for way in ("ordered", "unordered")]
    widths = tuning_cuda.widths(headdim, headdim)
    rows = dict.fromkeys((first, apart, *together))
    return [row for row in rows if row.fits(gpu.shared_limit(arch), *widths) and row.dkdv.registers(*widths) <= 192]


def row_of(spec: Any, device: torch.device | None = None) -> Row:
    """The row of a validated call; without a device, on the current one of the call's kind."""
    device = torch.device(spec.device) if device is None else device
    row = find(cuda.arch(device), max(spec.headdim, spec.headdim_v), _pairs(spec)) if _trial is None else _trial
    return row._replace(dq="ordered") if spec.deterministic and row.dq == "unordered" else row


def _pairs(spec: Any) -> bool:
    """Does the call tell single pairs apart, so that a kernel looks at each?"""
    return bool(spec.mask or spec.bias or spec.alibi or spec.dropout_p or spec.softcap is not None)


class Kernels(NamedTuple):
    """What a backward launches, the last two where their gradients are asked for. dq: computes it, or rounds its sums."""

    delta: cuda.Kernel
    dkdv: cuda.Kernel
    dq: cuda.Kernel
    dbias: cuda.Kernel
    dsinks: cuda.Kernel


@functools.cache
def _kernels(dtype: torch.dtype, headdim: int, headdim_v: int, row: Row, aligned: bool, pairs: bool) -> Kernels:
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
    return Kernels(
        kernel("delta", "delta", (aligned,), 256),
        kernel("dkdv", "dkdv", dkdv, row.dkdv.threads, row.dkdv.shared(d, dv, row.adds_dq)),
        dq,
        kernel(
            "dbias", "dbias", (d, dv, *_DBIAS, aligned), 2 * block_m,
            2 * (d + dv) * (block_m + block_n) + block_m * block_n // 4,
        ),
        kernel("dsinks", "delta", (), 256, _SUMS),
    )  # fmt: skip


def _row_strides(t: Tensor | None) -> tuple[int, int]:
    """Strides of lse over batch and head."""
    s = (0, 0) if t is None else t.stride()
    return (s[0], s[1]) if len(s) == 3 else (0, s[0])


def _four_sizes(t: Tensor) -> tuple[int, ...]:
    return (*(1,) * (4 - t.dim()), *t.shape)


def _pair_sizes(spec: Any) -> tuple[int, ...]:
    return spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k


def _sides(t: Tensor | None) -> tuple[int, int]:
    """Does a bias have queries, has it keys?"""
    return (0, 0) if t is None else (int(t.dim() > 1 and t.shape[-2] > 1), int(t.dim() > 0 and t.shape[-1] > 1))


def _blocks(rows: int, block: int) -> int:
    return -(-rows // block)


class _Sums(NamedTuple):
    """What dq is added up in: AttentionBwdParams' dq_sums, dq_turns, dq_tiles, heads_together."""

    dq: Tensor | None
    turns: Tensor | None
    tiles: int
    heads_together: int


_NO_SUMS = _Sums(None, None, 0, 1)


def _sums(spec: Any, q: Tensor, row: Row) -> _Sums:
    """In turns at most eight blocks of keys of one head run at once, since each starts a tile behind the one before it; in any
    order one head runs after the other, for the L2 cache."""
    block_m, block_n = row.dkdv[:2]
    d, _ = tuning_cuda.widths(spec.headdim, spec.headdim_v)
    per_head = q.shape[0] // block_m + spec.batch if spec.packed else _blocks(spec.seqlen_q, block_m)
    tiles = per_head * spec.nheads * (1 if spec.packed else spec.batch)
    shape = (tiles, block_m * d)
    if row.dq == "unordered":
        return _Sums(q.new_zeros(shape, dtype=torch.float32), None, per_head, 1)
    side_by_side = max(1, min(8, _blocks(spec.seqlen_k, block_n)))
    at_once = cuda.sms(q.device) * 256 // row.dkdv.threads  # eight warps share a multiprocessor
    heads = max(1, min(spec.batch * spec.nheads_k, at_once // side_by_side))
    turns = q.new_zeros(1 + tiles, dtype=torch.int32)
    return _Sums(q.new_empty(shape, dtype=torch.float32), turns, per_head, heads)


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
    row = row_of(spec, q.device)
    aligned = all(map(rows_aligned, (q, k, v, o, do)))
    kernels = _kernels(spec.dtype, spec.headdim, spec.headdim_v, row, aligned, _pairs(spec))
    lse_log2, delta = lse.new_empty((2, *lse.shape))
    hopper = cuda.hopper(q.device) and _cuda_bwd_sm90.takes(spec, q, k, v, do)
    sums = _NO_SUMS if hopper or not row.adds_dq else _sums(spec, q, row)

    def values(batch: int, seqlen_q: int, dbias: Tensor | None) -> tuple[Any, ...]:
        """AttentionBwdParams."""
        return (
            q, k, v, o, do, lse, dlse, lse_log2, delta, dq, sums.dq, sums.turns, dk, dv, dbias,
            dsinks, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox,
            *strides(q), *strides(k), *strides(v), *strides(o), *strides(do), *strides(dq), *strides(dk), *strides(dv),
            *_row_strides(lse), *_row_strides(dlse), *_row_strides(delta), *pair_strides(mask),
            *pair_strides(bias), *pair_strides(dbias), slopes_stride(alibi_slopes),
            batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, seqlen_q, spec.seqlen_k,
            *edges(spec), int(spec.upper_left), is_float(bias), is_float(sinks),
            *((1, 1) if dbias is None else _four_sizes(dbias)[:2]), *_sides(bias), sums.tiles, sums.heads_together,
            float(spec.scale), spec.softcap or 0.0, *dropout(spec),
        )  # fmt: skip

    full = dbias if dbias is not None and _four_sizes(dbias) == _pair_sizes(spec) else None
    whole = values(spec.batch, spec.seqlen_q, full)
    rows, flat = (spec.batch, spec.seqlen_q), whole
    if spec.packed:  # what looks at queries alone takes them for one sequence
        rows = (1, lse.shape[-1])
        flat = values(*rows, None)
    blocks_n = _blocks(spec.seqlen_k, row.dkdv.BLOCK_N)
    blocks_m = _blocks(spec.seqlen_q, row.dq.BLOCK_M if isinstance(row.dq, Dq) else row.dkdv.BLOCK_M)
    cuda.run(kernels.delta, (_blocks(rows[1], 32) * spec.nheads * rows[0], 1, 1), flat, q.device)
    if hopper:
        _cuda_bwd_sm90.gradients(
            spec, do, q, k, v, lse_log2, delta, mask, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, philox, dq, dk, dv,
            dbias,
        )  # fmt: skip
    else:
        cuda.run(kernels.dkdv, (blocks_n * spec.nheads_k * spec.batch, 1, 1), whole, q.device)
        cuda.run(kernels.dq, (blocks_m * spec.nheads * spec.batch, 1, 1), whole, q.device)
    if dbias is not None and full is None and dbias.numel() > 0:
        found = dbias.new_zeros(_owned_sizes(spec, dbias))
        with_rows, with_cols = _sides(bias)
        blocks = (_blocks(spec.seqlen_q, _DBIAS[0]) if with_rows else 1) * (
            _blocks(spec.seqlen_k, _DBIAS[1]) if with_cols else 1
        )
        summed = values(spec.batch, spec.seqlen_q, found)
        cuda.run(kernels.dbias, (blocks * found.shape[0] * found.shape[1], 1, 1), summed, q.device)
        dbias.copy_(found.sum_to_size(_four_sizes(dbias)).view(dbias.shape))
    if dsinks is not None:
        cuda.run(kernels.dsinks, (spec.nheads, 1, 1), flat, q.device)


def _owned_sizes(spec: Any, dbias: Tensor) -> tuple[int, ...]:
    """What the dbias kernel writes. Where rows or columns are summed it is small, so heads and sequences are told apart
    for more blocks at once, and added up afterwards."""
    sizes = _four_sizes(dbias)
    return sizes if all(_sides(dbias)) else (spec.batch, spec.nheads, *sizes[2:])
