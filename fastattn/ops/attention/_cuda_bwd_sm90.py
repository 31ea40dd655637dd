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
WAYS = ("ahead", "ordered")
_NO_PAIRS = (0, 0, 0, 0)
_L2_BYTES = 32 << 20  # of the 50 MB: the rest is for k, v and what else runs
ANALYSIS = "by analysis: docs/design/hopper-backward.md; not measured"


class Row(NamedTuple):
    """Tiles of attention_bwd_sm90_kernel for heads up to (headdim, headdim_v) and calls of one kind, and how it goes about it.

    ahead    the scores of the next tile are computed behind this one's dq and dk
    ordered  blocks of keys add to dq in one order, so that equal inputs give equal bits; without it, in any order
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
    def shared(self) -> int:
        """Bytes of shared memory: k, v, stages of q and dout, dS (in the wide plan two stages and P), two slabs of dq, lse and
        delta, barriers."""
        wide, stages_dout = self.BLOCK_N == 64, 1 if self.headdim_v > 128 else 2
        rows = self.BLOCK_N * (self.headdim + self.headdim_v) + 2 * self.BLOCK_M * self.headdim
        rows += stages_dout * self.BLOCK_M * self.headdim_v + (3 if wide else 1) * self.BLOCK_M * self.BLOCK_N
        barriers = 8 * (4 + 2 * stages_dout + 2)
        return 2 * rows + 2 * 4 * 64 * 64 + 4 * self.BLOCK_M * (2 + stages_dout) + 128 + 80 + barriers

    @property
    def tile(self) -> int:
        """Floats of a tile of dq."""
        return self.BLOCK_M * self.headdim


_USUAL = frozenset(WAYS)
_WIDE = ((256, 128), (256, 256))
ROWS = (
    Row(64, 64, "plain", 128, 128, _USUAL),
    Row(128, 128, "plain", 64, 128, _USUAL),
    Row(128, 128, "masked", 64, 128, _USUAL),
    Row(128, 128, "pairs", 64, 64, _USUAL),
    *(Row(*heads, kind, 64, 64, _USUAL) for heads in _WIDE for kind in KINDS),
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
    found = [first] + [first._replace(ways=first.ways ^ {way}) for way in WAYS] + [first._replace(ways=frozenset())]
    if first.headdim_v % 128 == 0:  # both plans are there
        found += [row._replace(BLOCK_M=64, BLOCK_N=64) for row in found if row.BLOCK_N == 128]
    return [row._replace(source="under trial") for row in found]


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
    return row


def objections(spec: Any) -> list[str]:
    """Why the Hopper backward does not take a call; a call's strides are the business of `takes`."""
    reasons = []
    if spec.dtype not in _TYPES:
        reasons.append(f"dtype bfloat16 or float16, got {spec.dtype}")
    if find(spec.headdim, spec.headdim_v, kind_of(spec)) is None or spec.headdim % 8 or spec.headdim_v % 8:
        reasons.append(f"headdim and headdim_v up to 256, multiples of 8, got {spec.headdim}, {spec.headdim_v}")
    return reasons


def takes(spec: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dbias: Tensor | None) -> bool:
    """Is this a call for the Hopper backward, on such a GPU? With a softcap it does not write the gradient of a bias."""
    softcap = dbias is not None and spec.softcap is not None and _is_full(spec, dbias)
    return not softcap and not objections(spec) and all(_reachable(t) for t in (q, k, v, do))


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
        *("kAhead" if "ahead" in row.ways else "0", _pairs(spec)),
    )
    return cuda.kernel(
        "attention_bwd_sm90.cuh", "attention_bwd_sm90_kernel", constants, _LAYOUT, 384, row.shared, hopper=True
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
    turns = torch.zeros(1 + tiles, dtype=torch.int32, device=q.device) if "ordered" in row.ways else None
    blocks_n = -(-spec.seqlen_k // row.BLOCK_N)
    left, right = edge(spec.left, spec), edge(spec.right, spec)
    everything = spec.seqlen_q + spec.seqlen_k
    values = (
        _map(q, row.BLOCK_M), _map(do, row.BLOCK_M), _map(k, row.BLOCK_N), _map(v, row.BLOCK_N),
        q, k, v, do, lse_log2, delta, dq_sums, turns, dq, dk, dv, written, mask, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
        philox,
        *strides(q), *strides(k), *strides(v), *strides(do), *strides(dq), *strides(dk), *strides(dv),
        *((0, delta.stride(0)) if spec.packed else delta.stride()[:2]),
        *(number for t in (mask, bias, written) for number in (_NO_PAIRS if t is None else pair_strides(t))),
        0 if alibi_slopes is None else slopes_stride(alibi_slopes),
        spec.batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.seqlen_q, spec.seqlen_k,
        everything if left is None else left, everything if right is None else right, int(spec.upper_left),
        int(bias is not None and bias.dtype == torch.float32), float(spec.scale), spec.softcap or 0.0,
        *dropout(spec),
        per_head, blocks_n, _heads_together(spec, row, blocks_n, cuda.sms(q.device)),
    )  # fmt: skip
    cuda.run(kernel(spec, row), (blocks_n * spec.nheads_k * spec.batch, 1, 1), values, q.device)
    blocks_m = -(-spec.seqlen_q // row.BLOCK_M)
    cuda.run(dq_kernel(spec, row), (blocks_m * spec.nheads * spec.batch, 1, 1), values, q.device)
