"""Which tiles and which ways the Hopper attention backward uses: frozen rows, and the candidates among which a GPU decides."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn.ops.attention._trial import Trial

KINDS = ("plain", "masked", "pairs")  # the band alone; a mask or bias; softcap, ALiBi or dropout too
WAYS = ("ahead", "ordered", "persistent", "apart")
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

tried = Trial()


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
    row = tried.rows[0] if tried.rows else find(spec.headdim, spec.headdim_v, kind_of(spec))
    assert row is not None
    return row._replace(ways=row.ways | {"ordered"}) if spec.deterministic else row
