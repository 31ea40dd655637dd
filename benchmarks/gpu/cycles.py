"""A model of the Hopper attention forward: the cycles per tile that each unit needs, and the ceiling that follows.

    python -m fastattn.benchmarks.gpu.cycles [--clock 1.6] [--candidates]

Prints the table of docs/design/hopper.md: cycles per tile, then TFLOP/s. A model, not a measurement.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from fastattn.ops.attention import tuning_sm90
from fastattn.ops.attention.tuning_sm90 import Row

SMS, CLOCK = 132, 1.6  # multiprocessors of an H100 SXM or H200; GHz that are reported to remain under full tensor load
TENSOR = 2048  # multiply-adds of 16-bit numbers per cycle and multiprocessor: 989 TFLOP/s at 1.83 GHz
EXPONENTIALS, MULTIPLIERS, LOGIC, ISSUED = 16, 128, 64, 128  # results per cycle; instructions · lanes per cycle
SHARED = 128  # bytes per cycle, read or written
L2 = 6.65e12 / (
    SMS * CLOCK * 1e9
)  # bytes per cycle that each gets when all read: what OpenXLA's cost model says of an H100
POLYNOMIAL, POLYNOMIAL_SHARE = 8, 0.25  # instructions in place of one exponential; for so many of them
# How much of the exponentials' time FlashAttention-3's published rates leave unhidden at this clock: 497, 648 and 756 TFLOP/s at
# headdim 64, 128 and 256 (16k tokens, dense) are 0.74, 0.67 and 0.58.
EXPOSED = 2 / 3
LENGTHS = (512, 2048, 16384)
# Per score of a whole tile, as counted in the compiled loop: subtract the maximum and scale, and sum; maximum, and half a
# conversion of a pair; all of these and the exponential.
MULTIPLIED, LOGICAL, INSTRUCTIONS = 2, 1.5, 4.5
# And with a bias of 16-bit elements: scale and add; unpack and ask for -inf.
BIAS_MULTIPLIED, BIAS_LOGICAL, BIAS_BYTES = 2, 2, 2


class Cycles(NamedTuple):
    """Of one tile of keys for all rows of a block (of the two blocks of a multiprocessor, where there are two)."""

    tensor: float
    exponential: float
    multiplier: float
    logic: float
    issue: float
    shared: float
    l2: float

    @property
    def softmax(self) -> float:
        """What stands between the two products of one row, if nothing else ran."""
        return max(self.exponential, self.multiplier, self.logic, self.issue)

    @property
    def bound(self) -> str:
        return max(self._asdict(), key=lambda unit: getattr(self, unit))


def tile(row: Row) -> Cycles:
    """The cycles of a whole tile."""
    rows = row.BLOCK_M * row.blocks
    scores, groups = rows * row.BLOCK_N, rows // 64
    by_polynomial = POLYNOMIAL_SHARE if "polynomial" in row.ways else 0.0
    biased = int(row.kind == "bias")
    steps_s, steps_o = row.headdim / 16, row.BLOCK_N / 16
    # q·k: both operands are read from shared memory for every 64 rows; p·v: v alone, p is in registers
    read = groups * (steps_s * 32 * (64 + row.BLOCK_N) + steps_o * 32 * row.headdim_v)
    written = row.blocks * row.BLOCK_N * (_panels(row.headdim) + _panels(row.headdim_v)) * 128
    keys, bias = row.blocks * row.BLOCK_N * (row.headdim + row.headdim_v) * 2, biased * scores * BIAS_BYTES
    multiplied, logical = MULTIPLIED + biased * BIAS_MULTIPLIED, LOGICAL + biased * BIAS_LOGICAL
    instructions = INSTRUCTIONS + biased * (BIAS_MULTIPLIED + BIAS_LOGICAL)
    return Cycles(
        tensor=scores * (row.headdim + row.headdim_v) / TENSOR,
        exponential=scores * (1 - by_polynomial) / EXPONENTIALS,
        multiplier=scores * (multiplied + by_polynomial * POLYNOMIAL) / MULTIPLIERS,
        logic=scores * logical / LOGIC,
        issue=scores * (instructions - by_polynomial + by_polynomial * POLYNOMIAL) / ISSUED,
        shared=(read + written + 2 * bias) / SHARED,
        l2=(keys / row.cluster + bias) / L2,
    )


def _panels(columns: int) -> int:
    return -(-columns // 64)


def cycles_per_tile(row: Row, exposed: float = 0.0) -> float:
    """The busiest unit decides; `exposed` of the exponentials' time is not hidden behind the products. Without overlap a consumer's
    products and its softmax follow each other, and another consumer fills the gaps, so that half of the sum is the least."""
    c = tile(row)
    alone = 0.0 if "overlap" in row.ways else (c.tensor + c.softmax) / 2
    return max(*c, alone, c.tensor + exposed * c.exponential)


def tflops(row: Row, seqlen: int | None = None, *, exposed: float = 0.0, clock: float = CLOCK) -> float:
    """TFLOP/s at that many queries and keys, causal for the rows of a band; without a length, of whole tiles alone.

    A block of queries also pays for what nothing overlaps with: its first softmax, and half of a tile's products before and
    behind. Each 64 rows pay for every tile that they see something of as a whole; useful are the pairs that are seen.
    """
    c, each = tile(row), cycles_per_tile(row, exposed)
    flops, causal = 2 * (row.headdim + row.headdim_v), row.kind == "band"
    if seqlen is None:
        return flops * row.BLOCK_M * row.blocks * row.BLOCK_N / each * SMS * clock / 1e3
    spent = pairs = 0.0
    for m0 in range(0, seqlen, row.BLOCK_M):
        queries = min(row.BLOCK_M, seqlen - m0)
        ends = range(m0 + 64, m0 + row.BLOCK_M + 64, 64)  # of each consumer's rows
        tiles = [-(-(min(end, seqlen) if causal else seqlen) // row.BLOCK_N) for end in ends if end - 64 < seqlen]
        spent += (sum(tiles) / len(ends) * each + c.softmax + c.tensor / 2) / row.blocks
        pairs += queries * (m0 + (queries + 1) / 2) if causal else queries * seqlen
    return flops * pairs / spent * SMS * clock / 1e3


def registers(row: Row) -> int:
    """Of a consumer's thread: scores, their packed copy where the next scores come early, and o."""
    return row.BLOCK_N // 2 + (row.BLOCK_N // 4 if "overlap" in row.ways else 0) + row.headdim_v // 2


def line(row: Row, clock: float) -> str:
    c = tile(row)
    ways = " ".join(w for w in tuning_sm90.WAYS if w in row.ways) or "-"
    cells = (
        f"{row.headdim}/{row.headdim_v}", row.kind, f"{row.BLOCK_M}x{row.BLOCK_N}", str(row.stages), ways, str(registers(row)),
        f"{row.shared / 1024:.0f}", *(f"{n:.0f}" for n in (c.tensor, c.exponential, c.issue, c.shared, c.l2)),
        f"{tflops(row, clock=clock):.0f}", f"{tflops(row, LENGTHS[-1], clock=clock):.0f}",
        *(f"{tflops(row, n, exposed=EXPOSED, clock=clock):.0f}" for n in LENGTHS),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| head | kind | tile | stages | ways | registers | shared KB | tensor | ex2 | issue | shared | L2 | whole tiles "
    f"| {LENGTHS[-1]} | {' | '.join(f'expected {n}' for n in LENGTHS)} |"
)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.benchmarks.gpu.cycles", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--clock", type=float, default=CLOCK, help="GHz")
    parser.add_argument("--candidates", action="store_true", help="every row that a GPU is to choose from, best first")
    options = parser.parse_args()
    print(HEADER, "|---" * HEADER.count(" | ") + "|---|", sep="\n")
    for kind in ("dense", "band", "bias"):
        for heads in tuning_sm90.HEADS:
            rows = [tuning_sm90.find(*heads, kind)]
            if options.candidates:
                rows = sorted(tuning_sm90.candidates(*heads, kind), key=lambda r: -tflops(r, 4096, exposed=EXPOSED))
            print(*(line(row, options.clock) for row in rows), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
