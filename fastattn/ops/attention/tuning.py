"""Which tiles the Triton kernels use: frozen rows by architecture, head dimension, kind of call and width of the dtype."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.runtime import launch


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, and how Triton compiles the kernel.

    RESIDENT  so many programs per multiprocessor do one block after the other (a persistent grid); 0: each does one

    Where registers are short:
    ANEW      addresses are computed where they are used, not once: in each step of a masked walk, and for each walk
    ONE_WALK  where some tiles need a test for each pair, all are walked over as if they did
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    ANEW: bool = False
    ONE_WALK: bool = False
    RESIDENT: int = 0


class Row(NamedTuple):
    """Tiles for architectures from `arch`, head dimensions (the larger of q's and v's) up to `headdim`, and one kind.

    kind   dense: every pair is visible · band: causal and windows · pairs: something is masked, added or dropped by
           pair · and for some of these calls that need other tiles: tail: dense, with lengths that cut tiles · window: a
           band with a left edge · mask: pairs with a boolean mask · dropout, bias: pairs with them, without a mask
    width  bytes per element
    """

    arch: int
    headdim: int
    kind: str
    width: int
    fwd: Tile
    dq: Tile
    dkdv: Tile
    source: str

    def __str__(self) -> str:
        tiles = (
            f"{name} {t.BLOCK_M}x{t.BLOCK_N}, {t.num_warps} warps, {t.num_stages} stages"
            f"{', addresses anew' * t.ANEW}{', one walk' * t.ONE_WALK}"
            f"{f', {t.RESIDENT} resident' if t.RESIDENT else ''}"
            for name, t in self._tiles()
        )
        return f"{'; '.join(tiles)} ({self.source})"

    def _tiles(self) -> tuple[tuple[str, Tile], ...]:
        return ("fwd", self.fwd), ("dq", self.dq), ("dkdv", self.dkdv)


ANALYSIS = "by analysis: registers, spills and shared memory of the compiled kernels; not measured"
KINDS = ("dense", "band", "pairs")
WIDER = {"tail": "dense", "window": "band", "mask": "pairs", "dropout": "pairs", "bias": "pairs"}


def _rows(arch: int, width: int, kind: str, *tiles: tuple[int, Tile, Tile, Tile]) -> tuple[Row, ...]:
    return tuple(Row(arch, headdim, kind, width, fwd, dq, dkdv, ANALYSIS) for headdim, fwd, dq, dkdv in tiles)


ROWS = (
    *_rows(
        80, 2, "dense",
        (63, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),  # masked columns cost registers
        (64, Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        (128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        (256, Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (576, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    *_rows(
        80, 2, "tail",
        (96, Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        (128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        (512, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (576, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True)),
    ),
    *_rows(
        80, 2, "band",
        (63, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),  # masked columns cost registers
        (64, Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        (128, Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        (256, Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (576, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True)),
    ),
    *_rows(
        80, 2, "pairs",
        (64, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        (128, Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2, True)),
        (256, Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
        (512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (576, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True)),
    ),
    *_rows(
        80, 2, "mask",
        (32, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2, True)),
    ),
    *_rows(
        80, 2, "dropout",
        (63, Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2, True)),
    ),
    *_rows(
        80, 2, "bias",
        (63, Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        (96, Tile(64, 64, 8, 2, True), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        (128, Tile(64, 64, 8, 2, True), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2, True)),
    ),
    *_rows(
        90, 2, "dense",
        (64, Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
        (128, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        (256, Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
        (576, Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    *_rows(
        90, 2, "tail",
        (32, Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
        (63, Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(32, 128, 8, 2)),
        (192, Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
        (256, Tile(128, 64, 8, 2, True), Tile(64, 32, 8, 2, True), Tile(32, 64, 8, 2, True, True)),
    ),
    *_rows(
        90, 2, "band",
        (64, Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(32, 128, 8, 2)),
        (128, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
        (192, Tile(128, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (256, Tile(128, 64, 8, 2, True), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (576, Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    *_rows(
        90, 2, "window",
        (256, Tile(128, 64, 8, 2, True), Tile(32, 32, 8, 2, True), Tile(32, 32, 8, 2)),
    ),
    *_rows(
        90, 2, "pairs",
        (64, Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
        (128, Tile(128, 32, 8, 3), Tile(64, 64, 8, 3, True), Tile(32, 64, 8, 2)),
        (256, Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
        (576, Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    *_rows(
        90, 2, "bias",
        (128, Tile(128, 32, 8, 3), Tile(64, 64, 8, 2, True), Tile(32, 64, 8, 2)),
    ),
    *_rows(
        100, 2, "band",
        (96, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
        (128, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3, True), Tile(64, 128, 8, 2)),
        (256, Tile(128, 64, 8, 2, True), Tile(32, 32, 8, 2, True), Tile(32, 32, 8, 2)),
    ),
    *_rows(
        100, 2, "pairs",
        (63, Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
        (64, Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2, True)),
    ),
    *_rows(
        100, 2, "mask",
        (64, Tile(128, 32, 8, 3, True), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    ),
    *_rows(
        100, 2, "tail",
        (32, Tile(128, 128, 8, 3, True), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
        (64, Tile(128, 128, 8, 3, True), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
        (96, Tile(128, 128, 8, 3, True), Tile(128, 64, 8, 3, True), Tile(64, 128, 8, 3)),
        (128, Tile(128, 128, 8, 2, True), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        (512, Tile(32, 32, 8, 1), Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 1)),
    ),
    *(
        row
        for arch in (80, 90)
        for kind in KINDS
        for row in _rows(
            arch, 4, kind,
            (64, Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
            (128, Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
            (256, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, arch == 80 and kind == "pairs")),
        )
    ),
    *(
        row
        for arch in (80, 90)
        for row in _rows(arch, 4, "dense", (576, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True)))
    ),
    *_rows(80, 4, "band", (576, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True, True), Tile(16, 16, 8, 1))),
    *_rows(80, 4, "pairs", (576, Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1, True, True), Tile(16, 16, 8, 1))),
    *_rows(90, 4, "band", (576, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))),
    *_rows(90, 4, "pairs", (576, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))),
    *_rows(
        80, 4, "tail",
        (192, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (256, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True)),
        (576, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1, True)),
    ),
    *_rows(
        80, 4, "band",
        (192, Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1)),
    ),
    *_rows(
        80, 4, "pairs",
        (63, Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1, True)),
        (192, Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    *_rows(
        80, 4, "mask",
        (63, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ),
    *_rows(
        80, 4, "dropout",
        (256, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True, True)),
    ),
    *_rows(
        80, 4, "window",
        (256, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True)),
    ),
    *_rows(
        100, 4, "dropout",
        (63, Tile(64, 32, 8, 1), Tile(32, 32, 8, 1, True), Tile(32, 32, 8, 1, True)),
        (576, Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1, True, True)),
    ),
    *_rows(
        100, 4, "mask",
        (576, Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1)),
    ),
    *_rows(
        100, 4, "tail",
        (512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1, True)),
    ),
    *_rows(
        90, 4, "tail",
        (192, Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    *(
        row
        for arch in (80, 90)
        for row in (
            *_rows(
                arch, 4, "mask",
                (64, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
                (576, Tile(16, 16, 8, 1, arch == 80), Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1)),
            ),
            *_rows(
                arch, 4, "dropout",
                (63, Tile(64, 32, 8, 1), Tile(32, 32, 8, 1, True), Tile(16, 64, 8, 1)),
                (576, Tile(16, 16, 8, 1, arch == 80), Tile(16, 16, 8, 1, True), Tile(16, 16, 8, 1, True, True)),
            ),
        )
    ),
)  # fmt: skip

_INTERPRETED = Row(
    0, 576, "any", 0, Tile(32, 16, 4, 1, True), Tile(32, 16, 4, 1, True), Tile(16, 32, 4, 1, True),
    "small tiles for the interpreter, so that few rows make several tiles",
)  # fmt: skip


def generation(arch: int) -> int:
    """Rows for 80 serve every GPU with about 100 KB of shared memory; those for 90 need 227 KB and warp-group products."""
    return 90 if 90 <= arch < 120 else 80


def serves(row: Row, arch: int) -> bool:
    """Rows for 100 are those of 90 that do not fit the later ones."""
    return generation(row.arch) == generation(arch) and row.arch <= arch


@functools.cache
def find(arch: int, headdim: int, kind: str, width: int) -> Row:
    """The row with the smallest head dimension that covers `headdim`; of such, one of the narrower kind, the latest."""
    kinds = (kind, WIDER.get(kind, kind))
    fits = [r for r in ROWS if serves(r, arch) and r.width == width and r.kind in kinds and r.headdim >= headdim]
    return min(fits, key=lambda r: (r.headdim, r.kind != kind, -r.arch))


def row(arch: int, headdim: int, kind: str, width: int) -> Row:
    """What a call uses: `find`, or small tiles in the interpreter."""
    return _INTERPRETED if launch.INTERPRETED else find(arch, headdim, kind, width)


def split(headdim: int) -> tuple[int, int]:
    """A head as a power of two, or as two of them where that pads less: 80 = 64 + 16, 192 = 128 + 64, 576 = 512 + 64."""
    whole = max(16, launch.next_power_of_2(headdim))
    rest = max(16, launch.next_power_of_2(headdim - whole // 2))
    return (whole, 0) if headdim <= 64 or rest >= whole // 2 else (whole // 2, rest)


FEWEST_KEYS = 128  # of a cache in a split that was not asked for


@functools.lru_cache(4096)
def splits(programs: int, capacity: int, slots: int) -> int:
    """How many splits let `programs` programs over a cache of `capacity` keys end soonest on `slots` that run at a time.

    Time is counted in keys: rounds of programs, each a split's keys and what a program costs besides, and the combining.
    """
    start, combine = 64, 128
    best, fewest = 1, -(-programs // slots) * (capacity + start)
    for n in range(2, min(capacity // FEWEST_KEYS, 256) + 1):
        time = -(-programs * n // slots) * (-(-capacity // n) + start) + combine + n
        if time < fewest:
            best, fewest = n, time
    return best


def kind(spec: Any) -> str:
    if spec.mask or spec.bias or spec.alibi or spec.dropout_p or spec.softcap is not None:
        return "pairs"
    return "dense" if spec.left is None and spec.right is None else "band"


def narrow_kind(spec: Any) -> str:
    """One of KINDS or of the keys of WIDER."""
    found = kind(spec)
    if found == "dense":
        return "tail" if spec.packed or spec.seqlen_q % 128 or spec.seqlen_k % 128 else found
    if found == "band":
        return found if spec.left is None else "window"
    return "mask" if spec.mask else "dropout" if spec.dropout_p else "bias" if spec.bias else found


def row_of(spec: Any, device: torch.device | None = None) -> Row:
    """The row of a validated call; without a device, on the current one of the call's kind."""
    device = torch.device(spec.device) if device is None else device
    width = 4 if spec.dtype == torch.float32 else 2
    return row(launch.arch(device), max(spec.headdim, spec.headdim_v), narrow_kind(spec), width)
