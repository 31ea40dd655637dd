"""Which tiles and which ways the Hopper attention forward uses: frozen rows, and the candidates among which a GPU decides."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

from fastattn.ops.attention import tuning
from fastattn.ops.attention._arguments import SMALLEST_SCALE
from fastattn.ops.attention._cuda_hopper import flags
from fastattn.ops.attention._trial import Trial

WAYS = ("overlap", "pingpong", "lazy", "polynomial", "dynamic", "apart", "multicast")
_SHARED_LIMIT = 227 << 10  # bytes a block may have; two blocks share 228 KB, 1 KB of each is the system's
_BARRIER_BYTES = 512  # more than the barriers and numbers of any plan
HEADS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))  # headdim, headdim_v of the kernels


class Row(NamedTuple):
    """What one specialisation of attention_fwd_sm90_kernel is made of, for heads up to (headdim, headdim_v) and one kind.

    kind    dense, band: as in `tuning`; general: softcap, ALiBi or a scale that is not positive; pairs: mask, dropout; bias: a
            bias; mixed: a bias with mask or dropout; short: none of the latter four, and at most 64 queries
    ways    how it goes about it, of WAYS; csrc/cuda/tile/plan_sm90.cuh says what each means
    """

    headdim: int
    headdim_v: int
    kind: str
    BLOCK_M: int
    BLOCK_N: int
    stages: int
    ways: frozenset[str]
    source: str

    def __str__(self) -> str:
        ways = " ".join(way for way in WAYS if way in self.ways) or "plain"
        bias = f"; {BIAS_ROADS}" if self.kind in _BIASED else ""
        return f"sm_90a {self.BLOCK_M}x{self.BLOCK_N}, {self.stages} stages, {ways}{bias} ({self.source})"

    @property
    def flags(self) -> str:
        """The template argument kWays."""
        return flags(*((_CPP_WAYS[way], way in self.ways) for way in WAYS))

    @property
    def threads(self) -> int:
        return 2 * self.BLOCK_M + 128

    @property
    def blocks(self) -> int:
        """Per multiprocessor."""
        return 2 if self.BLOCK_M == 64 and self.headdim_v <= 192 else 1

    @property
    def cluster(self) -> int:
        """Blocks that run together and share what they load of k and v."""
        return 2 if "multicast" in self.ways else 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory per block: q (or o in its place), stages of k, v and the widest bias, o if apart, barriers."""
        columns, columns_v = -(-self.headdim // 64) * 64, -(-self.headdim_v // 64) * 64
        apart = "apart" in self.ways
        elements = self.BLOCK_M * (columns if apart else max(columns, columns_v))
        elements += self.stages * self.BLOCK_N * (columns + columns_v) + (self.BLOCK_M * columns_v if apart else 0)
        bias = self.stages * self.BLOCK_M * self.BLOCK_N * 4 if self.kind in _BIASED else 0
        return 2 * elements + bias + _BARRIER_BYTES

    def fits(self) -> bool:
        """Shared memory, and registers as far as a count tells: s, its packed copy where overlapped, o, and 30 to work with.
        What the compiler makes of it is audited."""
        if self.ways >= {"multicast", "dynamic"}:  # a cluster walks a list that both of its blocks know
            return False
        limit = _SHARED_LIMIT if self.blocks == 1 else _SHARED_LIMIT // 2 - 1024
        budget = {64: 232, 128: 240, 192: 160}[self.BLOCK_M]
        packed = self.BLOCK_N // 4 if "overlap" in self.ways else 0
        return self.shared <= limit and self.BLOCK_N // 2 + packed + self.headdim_v // 2 + 30 <= budget


_CPP_WAYS = {
    "overlap": "kOverlap", "pingpong": "kPingPong", "lazy": "kLazy", "polynomial": "kPolynomial", "dynamic": "kDynamic",
    "apart": "kApart", "multicast": "kMulticast",
}  # fmt: skip
_BIASED = ("bias", "mixed")
BIAS_ROADS = "a bias by TMA in tiles or rows, element by element where its strides are no multiples of 16 bytes"
ANALYSIS = "by analysis: docs/design/hopper.md; not measured"
KINDS = ("dense", "band", "general", "pairs", "bias", "mixed", "short")
_USUAL, _LAZY = frozenset({"overlap", "lazy"}), frozenset({"lazy"})


def _rows(kind: str, *tiles: tuple[int, int, int], last: frozenset[str] = _USUAL) -> tuple[Row, ...]:
    """One tile (BLOCK_M, BLOCK_N, stages) for each of HEADS; `last` are the ways of the widest where these are not _USUAL."""
    rows = [Row(*heads, kind, *tile, _USUAL, ANALYSIS) for heads, tile in zip(HEADS, tiles, strict=True)]
    return (*rows[:-1], rows[-1]._replace(ways=last))


ROWS = (
    *_rows("dense", (192, 128, 2), (192, 96, 2), (128, 176, 2), (128, 128, 2), (128, 112, 2), (128, 80, 2)),
    *_rows("band", (192, 128, 2), (192, 96, 2), (128, 128, 2), (128, 128, 2), (128, 96, 2), (128, 80, 2)),
    *_rows("general", (192, 96, 2), (128, 128, 2), (128, 128, 2), (128, 128, 2), (128, 96, 2), (128, 80, 2)),
    *_rows("pairs", (128, 128, 2), (128, 96, 2), (128, 96, 2), (128, 96, 2), (128, 64, 2), (128, 48, 2), last=_LAZY),
    *_rows("bias", (128, 128, 2), (128, 96, 2), (128, 96, 2), (128, 64, 2), (128, 64, 2), (128, 48, 2), last=_LAZY),
    *_rows("mixed", (128, 64, 2), (128, 64, 2), (128, 64, 2), (128, 64, 2), (128, 48, 2), (128, 32, 2), last=_LAZY),
    *_rows("short", (64, 128, 2), (64, 96, 2), (64, 80, 2), (64, 64, 2), (64, 48, 2), (64, 64, 2)),
)

tried = Trial()


def heads_of(headdim: int, headdim_v: int) -> tuple[int, int] | None:
    """The narrowest of HEADS that covers a call."""
    return next((h for h in HEADS if headdim <= h[0] and headdim_v <= h[1]), None)


def kind_of(spec: Any) -> str:
    if spec.bias:
        return "mixed" if spec.mask or spec.dropout_p else "bias"
    if spec.mask or spec.dropout_p:
        return "pairs"
    if spec.seqlen_q <= 64:
        return "short"
    return "general" if spec.scale < SMALLEST_SCALE else tuning.kind(spec).replace("pairs", "general")


@functools.cache
def find(headdim: int, headdim_v: int, kind: str) -> Row:
    heads = heads_of(headdim, headdim_v)
    return next(r for r in ROWS if (r.headdim, r.headdim_v) == heads and r.kind == kind)


def row_of(spec: Any) -> Row:
    """The row of a call that the Hopper forward takes."""
    if tried.rows:
        return tried.rows[0]
    row = find(spec.headdim, spec.headdim_v, kind_of(spec))
    if spec.packed:  # lengths that the host does not know
        # the counter's ring takes registers, of which three consumers have few, and two with 256 columns of o none: those
        # walk the list as it was dealt
        narrower = 32 if row.BLOCK_M == 192 else 0
        order = {"dynamic"} if row.headdim_v < 256 else set()
        return row._replace(BLOCK_N=row.BLOCK_N - narrower, ways=row.ways - {"multicast"} | order)
    return row


def candidates(headdim: int, headdim_v: int, kind: str) -> list[Row]:
    """The rows to time against each other for one cell, today's first: its tile in every way, then other tiles in its way."""
    first = find(headdim, headdim_v, kind)
    heads = heads_of(headdim, headdim_v)
    assert heads is not None
    found = [first]
    toggles = [{way} for way in WAYS if way != "polynomial" or heads == (64, 64)]
    toggles += [{"overlap", "lazy"}, {"overlap", "pingpong"}, {"dynamic", "apart"}, {"multicast", "apart"}]
    found += [first._replace(ways=first.ways ^ toggle) for toggle in toggles]
    tiles = itertools.product((64, 128, 192), (48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 256), (1, 2, 3))
    widest = first.BLOCK_M * first.BLOCK_N
    found += [
        first._replace(BLOCK_M=m, BLOCK_N=n, stages=stages, ways=first.ways ^ toggle)
        for (m, n, stages), toggle in itertools.product(tiles, (set(), {"overlap"}, {"multicast"}))
        if m * n * 2 >= widest or m == 64
    ]
    rows = dict.fromkeys(row._replace(source="under trial") for row in found)
    return [row for row in rows if row.fits()]
