"""The contest of the Hopper rows, run on tiny shapes in the emulator with the host's clock."""

from __future__ import annotations

import pytest

from fastattn.benchmarks.gpu import hopper
from fastattn.benchmarks.gpu.timing import HostWatch
from fastattn.ops.attention import tuning_sm90
from fastattn.runtime import cuda, jit

if cuda.objections("cpu"):
    pytest.skip("; ".join(cuda.objections("cpu")), allow_module_level=True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "TOKENS", 96)
    monkeypatch.setattr(hopper, "WIDTH", 64)
    monkeypatch.setattr(hopper, "measure", lambda calls, *_: {name: _Timing(0.5) for name in calls})


class _Timing:
    def __init__(self, median: float) -> None:
        self.median = median


def test_candidates_begin_with_the_row_in_use():
    for phase in hopper.PHASES:
        for headdim in hopper.HEADS:
            found = hopper.candidates(phase, headdim, "band", 12)
            assert 3 <= len(found) <= 12 and len(set(found)) == len(found)
    used = tuning_sm90.find(128, 128, "dense")
    assert hopper.candidates("forward", 128, "dense", 5)[0].row[:-1] == used[:-1]


@pytest.mark.parametrize("phase", hopper.PHASES)
def test_a_contest_times_right_results_and_refuses_wrong_ones(phase, tiny, monkeypatch):
    group = hopper.candidates(phase, 64, "band", 2)
    facts = {group[0]: {"registers": 168}, group[1]: {"refused": "it spills"}}
    told: list = []
    first, second = hopper.contest(told.append, group, facts, 96, "cpu", HostWatch())
    assert first["tflops"] > 0 and "tflops" not in second and second["refused"] == "it spills"
    assert told == [0, hopper.TIMING]
    monkeypatch.setattr(hopper, "truth", lambda *args: tuple(t * 2 for t in _truth(*args)))
    (wrong, _) = hopper.contest(told.append, group, facts, 96, "cpu", HostWatch())
    assert wrong["refused"].startswith("wrong") and "tflops" not in wrong


_truth = hopper.truth


@pytest.mark.skipif(jit.error() is not None, reason=str(jit.error()))
def test_compiling_tells_what_a_row_uses_and_why_it_is_out():
    pytest.importorskip("triton")  # its wheel has cuobjdump
    fits, *_ = hopper.candidates("forward", 64, "dense", 1)
    facts = hopper.compiles(fits._replace(row=fits.row._replace(BLOCK_M=64, BLOCK_N=64)))
    assert facts["stack"] == 0 and facts["registers"] == 128 and "refused" not in facts
    impossible = hopper.compiles(fits._replace(row=fits.row._replace(BLOCK_N=264)))
    assert "refused" in impossible
