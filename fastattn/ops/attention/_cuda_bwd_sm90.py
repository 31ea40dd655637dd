"""The Hopper backward of the backend `cuda` (csrc/cuda/attention_bwd_sm90.cuh): what it takes, its rows and its launches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention._arguments import dropout, edge, pair_strides, slopes_stride, strides
from fastattn.ops.attention._cuda_sm90 import _map, _reachable
from fastattn.runtime import cuda

Tensor = torch.Tensor
_LAYOUT = ("attention_bwd_sm90_params.h", "AttentionBwdSm90Params")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
KINDS = (
    "plain",
    "masked",
    "pairs",
)  # plain: the band alone; masked: a mask or bias; pairs: softcap, ALiBi or dropout too
WAYS = ("ahead", "ordered", "persistent", "apart")
_NO_PAIRS = (0, 0, 0, 0)
_L2_BYTES = 32 << 20  # of the 50 MB: the rest is for k, v and what else runs
ANALYSIS = "by analysis: docs/design/hopper-backward.md; not measured"


class Row(NamedTuple):
    """Tiles of attention_bwd_sm90_kernel for heads up to (headdim, headdim_v) and calls of one kind, and how it goes about it.

    ahead    the scores of the next tile are computed behind this one's dq and dk
    ordered  blocks of keys add to dq in one order, so that equal inputs give equal bits; without it, in any order
    persistent  a block does work after work, and loads the next one's tiles while it stores this one's results; kind plain alone
    apart    each consumer has a warp that adds its part of dq, and waits for the other once per tile; BLOCK_N 128 alone
    """

    headdim: int
    headdim_v: int
    kind: str
    BLOCK_M: int
    BLOCK_N: int
    ways: frozenset[str]
    source: str = ANALYSIS

    def __str__(self) -> str:
        ways = " ".join(way for way in WAYS if way in self.ways) or "plain"
        return f"sm_90a {self.BLOCK_M}x{self.BLOCK_N}, {ways} ({self.source})"

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply; one more serves them."""
        return 3 if self.BLOCK_N == 96 else 2

    @property
    def parts(self) -> int:
        """Of a tile of dq: they are added one by one, each in its own turn."""
        return self.consumers if "apart" in self.ways else 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory, as BwdPlan (csrc/cuda/tile/plan_bwd_sm90.cuh) lays them out."""
        stages_dout = 1 if self.headdim_v > 128 else 2
        pairs = {128: self.parts, 96: 2, 64: 3}[self.BLOCK_N]  # tiles of dS and P
        tiles = self.BLOCK_N * (self.headdim + self.headdim_v) + 2 * self.BLOCK_M * self.headdim
        tiles += stages_dout * self.BLOCK_M * self.headdim_v + pairs * self.BLOCK_M * self.BLOCK_N
        slabs, rows = self.consumers * 4 * 64 * 64, 4 * self.BLOCK_M * (2 + stages_dout)
        works = 96 * (3 if "persistent" in self.ways else 1)
        return 2 * tiles + slabs + rows + 192 + 2048 + 2 * 16 + works + 16 + 8 * (13 + 2 * stages_dout)

    @property
    def tile(self) -> int:
        """Floats of a tile of dq."""
        return self.BLOCK_M * self.headdim


_USUAL = frozenset(("ahead", "ordered"))
ROWS = (
    Row(64, 64, "plain", 128, 128, _USUAL),
    Row(128, 128, "plain", 64, 128, _USUAL),
    Row(128, 128, "masked", 64, 128, _USUAL),
    Row(128, 128, "pairs", 64, 64, _USUAL),
    Row(192, 128, "plain", 64, 96, _USUAL),
    Row(192, 128, "masked", 64, 96, _USUAL),
    Row(192, 192, "plain", 64, 96, frozenset(("ordered",))),
    *(Row(256, headdim_v, kind, 64, 64, _USUAL) for headdim_v in (128, 256) for kind in KINDS),
)

_trial: Row | None = None


@contextlib.contextmanager
def tried(row: Row) -> Iterator[None]:
    """Within the block every call of the Hopper backward uses `row`, which must cover its heads."""
    global _trial
    before, _trial = _trial, row
    try:
        yield
    finally:
        _trial = before


def candidates(headdim: int, headdim_v: int, kind: str) -> list[Row]:
    """The rows to time against each other, today's first."""
    first = find(headdim, headdim_v, kind)
    assert first is not None
    ways = {first.ways, first.ways ^ {"ahead"}, first.ways ^ {"ordered"}, frozenset()}
    if kind == "plain" and first.headdim > 64:  # at 64 the scores of 128 queries leave no registers for it
        ways |= {first.ways | {"persistent"}}
    if first.BLOCK_N == 128:
        ways |= {each | {"apart"} for each in ways if "ahead" in each}
    found = [first._replace(ways=each) for each in sorted(ways - {first.ways}, key=sorted)]
    if first.headdim == first.headdim_v == 128 and first.BLOCK_N == 128:
        found += [row._replace(BLOCK_M=64, BLOCK_N=64) for row in [first, *found] if "apart" not in row.ways]
    return [row._replace(source="under trial") for row in [first, *found]]


def kind_of(spec: Any) -> str:
    if spec.softcap is not None or spec.alibi or spec.dropout_p:
        return "pairs"
    return "masked" if spec.mask or spec.bias else "plain"


def find(headdim: int, headdim_v: int, kind: str) -> Row | None:
    """The narrowest row that covers a call."""
    return next((r for r in ROWS if headdim <= r.headdim and headdim_v <= r.headdim_v and r.kind == kind), None)


def row_of(spec: Any) -> Row:
    """The row of a call that the Hopper backward takes."""
    row = find(spec.headdim, spec.headdim_v, kind_of(spec)) if _trial is None else _trial
    assert row is not None
    return row._replace(ways=row.ways | {"ordered"}) if spec.deterministic else row


def objections(spec: Any) -> list[str]:
    """Why the Hopper backward does not take a call; a call's strides are the business of `takes`."""
    reasons = []
    if spec.dtype not in _TYPES:
        reasons.append(f"dtype bfloat16 or float16, got {spec.dtype}")
    if find(spec.headdim, spec.headdim_v, kind_of(spec)) is None or spec.headdim % 8 or spec.headdim_v % 8:
        reasons.append(f"headdim and headdim_v up to 256, multiples of 8, got {spec.headdim}, {spec.headdim_v}")
    return reasons


def takes(spec: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> bool:
    """Is this a call for the Hopper backward, on such a GPU?"""
    return not objections(spec) and all(_reachable(t) for t in (q, k, v, do))


def _is_full(spec: Any, dbias: Tensor) -> bool:
    """Is a bias as large as the scores? The gradient of one that broadcasts has a kernel of its own."""
    return dbias.numel() == spec.batch * spec.nheads * spec.seqlen_q * spec.seqlen_k


def _pairs(spec: Any) -> str:
    """The template argument kPairs."""
    general = spec.softcap is not None or spec.alibi
    wanted = (("kGeneral", general), ("kMask", spec.mask), ("kBias", spec.bias), ("kDropout", spec.dropout_p > 0))
    return " | ".join(name for name, holds in wanted if holds) or "0"


def kernel(spec: Any, row: Row) -> cuda.Kernel:
    constants = (
        *(_TYPES[spec.dtype], str(row.headdim), str(row.headdim_v), str(row.BLOCK_M), str(row.BLOCK_N)),
        *(" | ".join(f"k{way.title()}" for way in WAYS if way in row.ways - {"ordered"}) or "0", _pairs(spec)),
    )
    return cuda.kernel(
        *("attention_bwd_sm90.cuh", "attention_bwd_sm90_kernel", constants, _LAYOUT, 128 * (1 + row.consumers)),
        row.shared,
        hopper=True,
    )


def dq_kernel(spec: Any, row: Row) -> cuda.Kernel:
    constants = (_TYPES[spec.dtype], str(row.headdim), str(row.BLOCK_M))
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
    return min(heads, max(1, _L2_BYTES // max(1, of_one)))


def gradients(
    spec: Any,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_log2: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
) -> None:
    """dq, dk, dv, and a dbias as large as the scores, from what the delta kernel prepared."""
    written = dbias if dbias is not None and _is_full(spec, dbias) else None
    row = row_of(spec)
    per_head = q.shape[0] // row.BLOCK_M + spec.batch if spec.packed else -(-spec.seqlen_q // row.BLOCK_M)
    tiles = per_head * spec.nheads * (1 if spec.packed else spec.batch)
    dq_sums = torch.zeros(tiles * row.tile, dtype=torch.float32, device=q.device)
    ordered, persistent = "ordered" in row.ways, "persistent" in row.ways
    counters = torch.zeros(1 + (row.parts * tiles if ordered else 0), dtype=torch.int32, device=q.device)
    drawn, turns = counters[:1] if ordered or persistent else None, counters[1:] if ordered else None
    blocks_n, sms = -(-spec.seqlen_k // row.BLOCK_N), cuda.sms(q.device)
    left, right = edge(spec.left, spec), edge(spec.right, spec)
    everything = spec.seqlen_q + spec.seqlen_k
    values = (
        _map(q, row.BLOCK_M), _map(do, row.BLOCK_M), _map(k, row.BLOCK_N), _map(v, row.BLOCK_N),
        q, k, v, do, lse_log2, delta, dq_sums, drawn, turns, dq, dk, dv, written,
        mask, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, philox,
        *strides(q), *strides(k), *strides(v), *strides(do), *strides(dq), *strides(dk), *strides(dv),
        *((0, delta.stride(0)) if spec.packed else delta.stride()[:2]),
        *(number for t in (mask, bias, written) for number in (_NO_PAIRS if t is None else pair_strides(t))),
        0 if alibi_slopes is None else slopes_stride(alibi_slopes),
        spec.batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.seqlen_q, spec.seqlen_k,
        everything if left is None else left, everything if right is None else right, int(spec.upper_left),
        int(bias is not None and bias.dtype == torch.float32), float(spec.scale), spec.softcap or 0.0,
        *dropout(spec),
        per_head, blocks_n, _heads_together(spec, row, blocks_n, sms),
    )  # fmt: skip
    works = blocks_n * spec.nheads_k * spec.batch
    blocks = min(works, sms) if persistent else works
    cuda.run(kernel(spec, row), (blocks, 1, 1), values, q.device)
    blocks_m = -(-spec.seqlen_q // row.BLOCK_M)
    cuda.run(dq_kernel(spec, row), (blocks_m * spec.nheads * spec.batch, 1, 1), values, q.device)
