"""Which tiles the CUDA kernels of the backward use: frozen rows by class of GPU, head dimension and kind of call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from fastattn.ops.attention import tuning_cuda
from fastattn.ops.attention._trial import Trial
from fastattn.runtime import gpu

_BLOCK, _BLOCK_OF_KEYS = 80, 112  # bytes of shared memory behind the tiles


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


tried = Trial()


def candidates(arch: int, headdim: int, pairs: bool) -> list[Row]:
    """The rows to time against each other, today's first. What the compiler makes of new tiles is for the audit to say."""
    first = _closest(ROWS, arch, headdim, pairs)
    apart = _closest((*SEPARATE, *(row for row in ROWS if not row.adds_dq)), arch, headdim, pairs)
    tiles = dict.fromkeys((first.dkdv, apart.dkdv, *_TILES))
    together = [first._replace(dkdv=tile, dq=way) for tile in tiles for way in ("ordered", "unordered")]
    widths = tuning_cuda.widths(headdim, headdim)
    rows = dict.fromkeys((first, apart, *together))
    return [row for row in rows if row.fits(gpu.shared_limit(arch), *widths) and row.dkdv.registers(*widths) <= 192]


def row_of(spec: Any, arch: int) -> Row:
    """The row of a validated call on such a GPU."""
    pairs = tells_pairs(spec)
    if tried.rows:
        row = next((row for row in tried.rows if row.pairs == pairs), tried.rows[0])
    else:
        row = find(arch, max(spec.headdim, spec.headdim_v), pairs)
    return row._replace(dq="ordered") if spec.deterministic and row.dq == "unordered" else row


def tells_pairs(spec: Any) -> bool:
    """Does the call tell single pairs apart, so that a kernel looks at each?"""
    return bool(spec.mask or spec.bias or spec.alibi or spec.dropout_p or spec.softcap is not None)
