"""The cycle model of the Hopper attention forward: its arithmetic, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from fastattn.benchmarks.gpu import cycles
from fastattn.ops.attention import tuning_sm90
from fastattn.ops.attention.tuning_sm90 import Row

SQUARE = Row(128, 128, "dense", 128, 128, 2, frozenset({"overlap"}), "by hand")


def test_a_tile_costs_what_each_unit_needs():
    found = cycles.tile(SQUARE)
    assert found.tensor == 4 * 128 * 128 * 128 / 4096  # flops over flops per cycle
    assert found.exponential == 128 * 128 / 16
    assert found.issue == 128 * 128 * 4.5 / 128
    # for each 64 rows 8 steps of q·k read 64 + 128 rows of 32 bytes, 8 steps of p·v 16 rows of 256 bytes; k and v come in once
    assert found.shared == (2 * (8 * 192 * 32 + 8 * 16 * 256) + 2 * 128 * 256) / 128
    # k and v of the tile at what the L2 cache gives each multiprocessor: a little less than 128 rows want
    assert found.l2 == pytest.approx(2 * 128 * 128 * 2 / (6.65e12 / 132 / 1.6e9))
    assert found.bound == "l2" and found.l2 < 1.02 * found.tensor and found.softmax == found.exponential
    assert cycles.tile(SQUARE._replace(BLOCK_M=192, BLOCK_N=64)).bound == "tensor"


def test_a_cluster_halves_what_is_read_of_keys_and_values():
    shared = cycles.tile(SQUARE._replace(ways=SQUARE.ways | {"multicast"}))
    assert shared.l2 == cycles.tile(SQUARE).l2 / 2 and shared.bound == "tensor"


def test_a_bias_is_read_once_by_pair():
    plain, biased = cycles.tile(SQUARE), cycles.tile(SQUARE._replace(kind="bias"))
    pairs = 128 * 128
    assert biased.l2 == plain.l2 * 1.5 and biased.shared == plain.shared + 2 * 2 * pairs / 128
    assert biased.issue == pairs * 8.5 / 128 and biased.tensor == plain.tensor


def test_two_blocks_share_a_multiprocessor():
    small = SQUARE._replace(BLOCK_M=64, BLOCK_N=80)
    assert small.blocks == 2
    assert cycles.tile(small).tensor == 2 * 64 * 80 * 256 / 2048


def test_whole_tiles_run_at_the_peak_unless_exponentials_show():
    peak = 132 * 4096 * 1.6 / 1e3
    shared = SQUARE._replace(ways=SQUARE.ways | {"multicast"})
    assert cycles.tflops(shared) == pytest.approx(peak)
    assert cycles.tflops(shared, exposed=1.0) == pytest.approx(peak * 2048 / (2048 + 1024))


def test_short_and_causal_calls_pay_for_starts_and_for_hidden_pairs():
    dense = [cycles.tflops(SQUARE, n) for n in (512, 2048, 16384)]
    causal = [cycles.tflops(SQUARE._replace(kind="band"), n) for n in (512, 2048, 16384)]
    assert dense == sorted(dense) and causal == sorted(causal)
    assert all(c < d for c, d in zip(causal, dense, strict=True))
    # one block of 128 queries: 128 · 129 / 2 pairs are seen in one tile, and a softmax and half a tile are paid besides
    each = cycles.cycles_per_tile(SQUARE)
    one = cycles.tflops(SQUARE._replace(kind="band"), 128)
    assert one == pytest.approx(4 * 128 * 128 * 129 / 2 / (each + 1024 + 1024) * 132 * 1.6 / 1e3)


def test_rows_do_not_pay_for_tiles_that_they_do_not_see():
    narrow = SQUARE._replace(kind="band", BLOCK_N=64)
    c, each = cycles.tile(narrow), cycles.cycles_per_tile(narrow)
    # the first 64 rows see one tile, the others two
    found = cycles.tflops(narrow, 128)
    assert found == pytest.approx(4 * 128 * 128 * 129 / 2 / (1.5 * each + c.softmax + c.tensor / 2) * 132 * 1.6 / 1e3)


def test_a_polynomial_takes_load_off_the_exponential_unit():
    some = SQUARE._replace(ways=frozenset({"overlap", "polynomial"}))
    assert cycles.tile(some).exponential == 0.75 * cycles.tile(SQUARE).exponential
    assert cycles.tile(some).issue > cycles.tile(SQUARE).issue


def test_the_table_has_a_line_for_every_head(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cycles"])
    assert cycles.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * len(tuning_sm90.HEADS) and len({line.count("|") for line in lines}) == 1
