"""Which tiles the CUDA kernels use: frozen rows by class of GPU, head dimension and kind of call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention._arguments import SMALLEST_SCALE
from fastattn.runtime import cuda, gpu

WIDTHS = (32, 64, 96, 128, 192, 256)  # heads are padded with zeros to the next


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys; each warp owns BLOCK_M / kWarps queries."""

    BLOCK_M: int
    BLOCK_N: int
    kWarps: int
    kStages: int
    q_in_registers: bool = False


class Row(NamedTuple):
    """The forward's tile for GPUs with at least `shared` KB of shared memory per block, padded head dimensions, and a kind.

    kind   band: plain scores within a band · pairs: a mask, bias, softcap, ALiBi · dropout: the same with dropout
    """

    shared: int
    headdim: int
    headdim_v: int
    kind: str
    fwd: Tile
    source: str

    def __str__(self) -> str:
        t = self.fwd
        where = "registers" if t.q_in_registers else "shared memory"
        return f"fwd {t.BLOCK_M}x{t.BLOCK_N}, {t.kWarps} warps, {t.kStages} stages, q in {where} ({self.source})"


ANALYSIS = "by analysis: registers, spills and shared memory of the compiled kernels; not measured"
KINDS = ("band", "pairs", "dropout")


def _rows(shared: int, *tiles: tuple[int, int, Tile, Tile, Tile]) -> tuple[Row, ...]:
    return tuple(
        Row(shared, headdim, headdim_v, kind, tile, ANALYSIS)
        for headdim, headdim_v, *by_kind in tiles
        for kind, tile in zip(KINDS, by_kind, strict=True)
    )


# Two blocks of 4 warps, or one of 8, share a multiprocessor: 255 registers each. Warps of 32 queries read k and v from shared
# memory half as often as warps of 16; scores of kinds beyond `band` need registers, wide heads too, and take 8 warps of 16.
ROWS = (
    *_rows(
        227,
        (32, 32, Tile(128, 128, 4, 2, True), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (64, 64, Tile(128, 128, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (96, 96, Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (128, 128, Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (192, 128, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (192, 192, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (256, 256, Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    ),
    *_rows(
        163,
        (32, 32, Tile(128, 128, 4, 2, True), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (64, 64, Tile(128, 128, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (96, 96, Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (128, 128, Tile(128, 64, 4, 1), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (192, 128, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (192, 192, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (256, 256, Tile(128, 64, 8, 1), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    ),
    *_rows(
        99,
        (32, 32, Tile(128, 128, 4, 2, True), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (64, 64, Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (96, 96, Tile(128, 64, 4, 1), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (128, 128, Tile(128, 64, 8, 2, True), Tile(128, 64, 8, 2, True), Tile(128, 32, 8, 2, True)),
        (192, 128, Tile(128, 64, 8, 2, True), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        (192, 192, Tile(128, 64, 8, 2, True), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        (256, 256, Tile(128, 32, 8, 1), Tile(128, 32, 8, 1), Tile(128, 32, 8, 1)),
    ),
)  # fmt: skip


def widths(headdim: int, headdim_v: int) -> tuple[int, int]:
    """What a head is padded to. Only 192 knows another width of v."""
    wide = min(w for w in WIDTHS if w >= max(headdim, headdim_v))
    return (wide, 128) if wide == 192 and headdim_v <= 128 else (wide, wide)


def kind(spec: Any) -> str:
    if spec.dropout_p:
        return "dropout"
    plain = not (spec.mask or spec.bias or spec.alibi) and spec.softcap is None and spec.scale >= SMALLEST_SCALE
    return "band" if plain else "pairs"


@functools.cache
def find(arch: int, headdim: int, headdim_v: int, kind: str) -> Row:
    limit = gpu.shared_limit(arch) >> 10
    fits = [r for r in ROWS if (r.headdim, r.headdim_v, r.kind) == (headdim, headdim_v, kind) and r.shared <= limit]
    return max(fits, key=lambda r: r.shared)


def row_of(spec: Any) -> Row:
    """The row of a validated call, on the current device of its kind."""
    return find(cuda.arch(torch.device(spec.device)), *widths(spec.headdim, spec.headdim_v), kind(spec))
