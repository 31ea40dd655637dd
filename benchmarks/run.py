"""Runs cases: prepares contenders, holds each to the law, times the lawful ones, yields one row per contender."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastattn

from . import attention, latency, layer_norm, rms_norm, rope
from .case import COMPILED, OURS, AbsentError, Case, Contender, Prepared, Problem
from .law import FACTOR, judge
from .machine import Attainable
from .timing import Canary, Timing, measure

ROOMS: dict[str, Callable[[bool], list[Case]]] = {
    "attention": attention.cases,
    "layer_norm": layer_norm.cases,
    "rms_norm": rms_norm.cases,
    "rope": rope.cases,
    "latency": latency.cases,
}
# glibc then recycles freed memory instead of giving it back: no page faults in anybody's time.
PINNED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


@dataclass(frozen=True)
class Row:
    """One contender of one case, as it stands in the JSON lines.

    status  "ok" · "WRONG": the result breaks the law, so it has no time · "absent": cannot run here · "failed": raised
    rate    GFLOP/s or GB/s;  share: of the attainable measured in this run;  ratio: this time / fastattn's
    """

    room: str
    row: str
    label: str
    dtype: str
    malloc: str
    threads: int
    bound: str
    axis: str
    x: int
    contender: str
    status: str
    reason: str = ""
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int = 0
    quiet: int = 0
    noisy: bool = False
    rate: float | None = None
    attainable: float | None = None
    share: float | None = None
    ratio: float | None = None
    error: float | None = None
    error_ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def select(rooms: Iterable[str] = (), dtypes: Iterable[str] = (), quick: bool = False) -> list[Case]:
    """The cases of these rooms and dtypes; nothing named means all."""
    rooms, dtypes = list(rooms) or list(ROOMS), list(dtypes)
    return [case for room in rooms for case in ROOMS[room](quick) if not dtypes or case.dtype in dtypes]


class Runner:
    """Measures case by case; canary and peaks are shared by all cases of a run, so that `best` means the run's best."""

    def __init__(self, budget_s: float, quick: bool = False) -> None:
        self.budget_s, self.quick = budget_s, quick
        self.attainable = Attainable()
        self._canaries: dict[int, Canary] = {}

    def canary(self, threads: int) -> Canary:
        if threads not in self._canaries:
            self._canaries[threads] = Canary.of_machine(threads)
            for _ in range(20):
                self._canaries[threads].sing()
        return self._canaries[threads]

    def run(self, case: Case) -> list[Row]:
        with _threads(case.threads) as threads:
            problem = case.build()
            rows: dict[str, dict[str, Any]] = {}
            calls: dict[str, Callable[[], object]] = {}
            for contender in problem.contenders:
                rows[contender.name], prepared = self._admit(contender, problem, case)
                if prepared is not None:
                    calls[contender.name] = prepared.call
            before = self._peak(case, threads)
            timings = measure(calls, self.canary(threads), budget_s=self.budget_s)
            peak = self._peak(case, threads) or before
        ours = timings.get(OURS)
        found = []
        for name, facts in rows.items():
            if name in timings:
                facts |= speed(case, timings[name], ours, peak)
            found.append(_row(case, threads, name, facts))
        del problem, calls
        gc.collect()
        return found

    def _admit(self, contender: Contender, problem: Problem, case: Case) -> tuple[dict[str, Any], Prepared | None]:
        if self.quick and contender.name in COMPILED and case.row != "window":
            return {"status": "absent", "reason": "left out by --quick, because compiling takes seconds"}, None
        return admit(contender, problem)

    def _peak(self, case: Case, threads: int) -> float | None:
        if case.bound == "flops":
            return self.attainable.flops(case.dtype, threads)
        if case.bound == "copy":
            return self.attainable.copy(int(case.work), threads)
        return self.attainable.read(int(case.work), threads) if case.bound == "read" else None


def admit(contender: Contender, problem: Problem) -> tuple[dict[str, Any], Prepared | None]:
    """Prepare, run once, judge. Only a lawful contender is timed."""
    try:
        prepared = contender.prepare()
        factor = FACTOR if contender.name == OURS else problem.rival_factor
        verdict = judge(prepared.results(prepared.call()), problem.plain, problem.truth, factor)
    except AbsentError as absence:
        return {"status": "absent", "reason": str(absence)}, None
    except Exception as failure:  # a rival that breaks is a row of the table, not the end of the run
        text = str(failure).strip().splitlines() or [""]
        return {"status": "failed", "reason": f"{type(failure).__name__}: {text[0][:200]}"}, None
    errors = {"error": verdict.error, "error_ratio": verdict.ratio if verdict.ratio < math.inf else None}
    if not verdict.lawful:
        return {"status": "WRONG", "reason": verdict.reason, **errors}, None
    return {"status": "ok", **errors}, prepared


def speed(case: Case, timing: Timing, ours: Timing | None, peak: float | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "seconds": timing.median,
        "p20": timing.p20,
        "p80": timing.p80,
        "samples": timing.samples,
        "quiet": timing.quiet,
        "noisy": timing.noisy,
    }
    if ours is not None:
        facts["ratio"] = timing.median / ours.median
    if case.work:
        facts["rate"] = case.work / timing.median / 1e9
        if peak:
            facts |= {"attainable": peak, "share": facts["rate"] / peak}
    return facts


def _row(case: Case, threads: int, contender: str, facts: dict[str, Any]) -> Row:
    place = (case.room, case.row, case.label, case.dtype, case.malloc, threads, case.bound, case.axis, case.x)
    return Row(*place, contender, **facts)


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    usual = torch.get_num_threads()
    torch.set_num_threads(count or usual)
    try:
        yield count or usual
    finally:
        torch.set_num_threads(usual)


def run_all(
    cases: list[Case], *, budget_s: float, progress: Callable[[str], None] = lambda key: None, quick: bool = False
) -> Iterator[list[Row]]:
    """Every case's rows. Those with malloc pinned run in a child process, since glibc reads its settings at start."""
    runner = Runner(budget_s, quick)
    for case in (c for c in cases if c.malloc == "default"):
        progress(case.key)
        yield runner.run(case)
    pinned = [case for case in cases if case.malloc == "pinned"]
    if pinned:
        yield from _in_child(pinned, budget_s, progress, quick)


def _in_child(cases: list[Case], budget_s: float, progress: Callable[[str], None], quick: bool) -> Iterator[list[Row]]:
    order = {"budget_s": budget_s, "quick": quick, "threads": torch.get_num_threads(), "keys": [c.key for c in cases]}
    command = [sys.executable, "-m", "fastattn.benchmarks.run", json.dumps(order)]
    # The child imports this very package, installed or not.
    path = os.pathsep.join(
        filter(None, [str(Path(fastattn.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
    )
    progress(cases[0].key)
    with subprocess.Popen(
        command, env={**os.environ, **PINNED, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for done, line in enumerate(child.stdout, 1):
            yield [Row(**facts) for facts in json.loads(line)]
            if done < len(cases):
                progress(cases[done].key)
    if child.returncode:
        raise RuntimeError(f"bench: the process with malloc pinned ended with status {child.returncode}")


def _child(order: dict[str, Any]) -> None:
    """Print one JSON list of rows per case; everything else that prints goes to stderr."""
    results, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(order["threads"])
    wanted = {case.key: case for case in select(quick=order["quick"])}
    runner = Runner(order["budget_s"], order["quick"])
    for key in order["keys"]:
        print(json.dumps([row.as_dict() for row in runner.run(wanted[key])]), file=results, flush=True)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
