"""The GPU measurements, on tiny shapes: problems, law, rivals, rows, files. Without a GPU on a CPU, by the host's clock."""

from __future__ import annotations

import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from fastattn.benchmarks.case import OURS
from fastattn.benchmarks.gpu import attention, memory, run, tune
from fastattn.benchmarks.gpu.machine import Peaks, describe
from fastattn.benchmarks.gpu.timing import EventWatch, HostWatch, measure
from fastattn.benchmarks.shapes import AttentionShape, square
from fastattn.benchmarks.timing import Timing

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0) if torch.cuda.is_available() else None


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same parts over shapes of a few tokens."""
    monkeypatch.setattr(attention, "TOKENS", 64)
    monkeypatch.setattr(attention, "WIDTH", 64)
    monkeypatch.setattr(attention, "SEQLENS", (16, 32, 64))
    monkeypatch.setattr(attention, "HEADDIMS", (16, 32))
    masked = {
        "padding mask": [square(2, 2, 32, 16, lengths=(32, 7))],
        "additive bias": [square(2, 2, 32, 16, bias="heads")],
        "window": [square(1, 2, 64, 16, causal=True, window=9)],
        "prefill": [square(1, 4, 32, 16, nheads_k=2, causal=True)],
        "packed": [square(1, 2, 33, 16, lengths=(20, 13), packed=True, causal=c) for c in (False, True)],
    }
    monkeypatch.setattr(attention, "MASKED", masked)
    monkeypatch.setattr(attention, "DECODE", [AttentionShape(2, 4, 1, 40, 16, nheads_k=2)])
    monkeypatch.setattr(memory, "NORMS", [(8, 64), (5, 100)])
    monkeypatch.setattr(memory, "ROPE", [(2, 8, 4, 2, 16)])
    if GPU is None:
        monkeypatch.setattr(run, "FAMILIES", ())  # they are others' tests, and slow here
    # compiling takes seconds, and the programs under test do not depend on it
    monkeypatch.setattr("fastattn.benchmarks.rivals.compiled", lambda function: function)
    monkeypatch.setattr("fastattn.benchmarks.gpu.rivals.compiled", lambda function: function)


@pytest.mark.parametrize("part", run.PARTS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # FlexAttention's about running without compilation
def test_every_part_yields_lawful_rows(part, tiny, tmp_path):
    device, watch = (CPU, HostWatch()) if GPU is None else (GPU, EventWatch(GPU))
    peaks = Peaks(device, watch, size=64, copied=1 << 16)
    rows = []
    for case in run.PARTS[part](part, device, False):
        found = run.run_case(case, watch, peaks, 0.01)
        assert found[0].contender == OURS and found[0].status == "ok", found[0]
        assert found[0].seconds and found[0].rate and found[0].share and found[0].ratio == 1
        others = [row for row in found[1:] if row.status == "ok" and not row.contender.startswith(OURS)]
        refused = "FASTATTN_REHEARSAL" in os.environ  # torch's own kernels, there
        assert others or part in ("backward", "decode") or case.row == "packed" or refused, found
        for row in found[1:]:
            assert row.status in ("ok", "absent", "failed") and (row.status == "ok" or row.reason), row
        rows += found
        families = {row.contender for row in found if row.contender.startswith(f"{OURS} ") and row.status == "ok"}
        assert GPU is None or families or part == "norms", found
    run.write(tmp_path, part, describe(device), rows)
    first, *rest = (tmp_path / f"{part}.jsonl").read_text().splitlines()
    assert (json.loads(first)["machine"]["gpu"] == "none") == (GPU is None) and len(rest) == len(rows)
    assert rows[0].label in (tmp_path / f"{part}.md").read_text()


def test_the_families_of_fastattn_compete_with_each_other(tiny, monkeypatch):
    monkeypatch.setattr(run, "FAMILIES", ("triton", "reference", "cpu"))
    seconds = itertools.count(1)  # each its own
    monkeypatch.setattr(run, "measure", lambda calls, *_: {c: Timing(*[next(seconds)] * 5, noisy=False) for c in calls})
    case = attention.cases("forward", CPU)[0]
    ours = case.build().contenders[0]
    assert [c.name for c in run.contenders(case.build())][1:4] == [f"{OURS} {family}" for family in run.FAMILIES]
    rows = run.run_case(case, HostWatch(), Peaks(CPU, HostWatch(), size=64, copied=1 << 16), 0.01)
    found = {row.contender: row for row in rows}
    assert ours.name == OURS and found[f"{OURS} reference"].status == found[f"{OURS} triton"].status == "ok"
    assert [found[f"{OURS} {family}"].ratio for family in run.FAMILIES] == [2, 3, 4]


def test_a_backend_that_refuses_the_call_is_absent(tiny, monkeypatch):
    monkeypatch.setattr(run, "FAMILIES", ("cuda portable",))
    monkeypatch.setattr("fastattn.runtime.cuda.emulator", None)
    case = attention.cases("forward", CPU)[0]
    row = run.run_case(case, HostWatch(), Peaks(CPU, HostWatch(), size=64, copied=1 << 16), 0.01)[1]
    assert row.contender == f"{OURS} cuda portable" and row.status == "absent" and "cuda" in row.reason


def test_a_wrong_result_has_no_time(tiny, monkeypatch):
    import fastattn

    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *a, **k: right(*a, **k) * 1.1)
    case = attention.cases("forward", CPU)[0]
    row = run.run_case(case, HostWatch(), Peaks(CPU, HostWatch(), size=64, copied=1 << 16), 0.01)[0]
    assert row.status == "WRONG" and row.seconds is None


@pytest.mark.parametrize(("seconds", "expected"), [((0.004, 0.001, 0.002), 1), ((0.001, 0.004, 0.002), 0)])
def test_a_persistent_grid_wins_where_it_is_faster(seconds, expected, monkeypatch):
    """A grid of one program per multiprocessor is timed beside the plain one; one of two spills."""
    monkeypatch.setattr(tune, "captured", lambda candidate: candidate)
    monkeypatch.setattr(tune, "again", lambda found: lambda: time.sleep(seconds[found.tile.RESIDENT]))
    monkeypatch.setattr(
        tune, "compiles", lambda found, arch: {"refused": "it spills"} if found.tile.RESIDENT == 2 else {}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune, "measure", lambda calls, watch, budget: measure(calls, watch, 0.05))
    tile = tune.tuning.Tile(64, 64, 4, 2)
    slow = tune.Candidate(64, "dense", "fwd", tile._replace(BLOCK_N=32))
    facts = {tune.Candidate(64, "dense", "fwd", tile): {}, slow: {"refused": "it spills"}}
    with ThreadPoolExecutor(1) as pool:
        winner = tune.best(list(facts), facts, HostWatch(), pool, 90)
    assert winner is not None and winner.tile == tile._replace(RESIDENT=expected)
    assert [known.get("refused") for known in facts.values()] == [None, "it spills", None, "it spills"]


def test_the_grid_is_the_one_of_the_papers():
    shapes = attention.grid(quick=False)
    assert len(shapes) == 36 and all(s.batch * s.seqlen_q == 16384 for s in shapes)
    assert all(s.nheads * s.headdim == 2048 for s in shapes) and {s.headdim for s in shapes} == {64, 128, 256}
    long = next(s for s in shapes if s.seqlen_q == 8192 and s.headdim == 128 and not s.causal)
    assert long.forward_flops() == 4 * 2 * 16 * 8192**2 * 128
    assert replace(long, causal=True).forward_flops() == 2 * 2 * 16 * 8192 * 8193 * 128


def test_calls_take_turns_and_medians_are_of_all_rounds():
    order = []

    class Watch:
        def start(self, call):
            call()
            return lambda: 2.0 if order[-1] == "a" else 3.0

    timings = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, Watch(), 0.0)
    assert order[:6] == ["a"] * 3 + ["b"] * 3 and sorted(order[6:8]) == ["a", "b"]
    assert timings["a"].samples == timings["b"].samples == 5
