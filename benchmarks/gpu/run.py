"""Cases to rows on a GPU: every contender is held to float64 first, then timed beside the others."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.runtime import cuda

from .. import report
from ..case import OURS, AbsentError, Case, Contender, Prepared, Problem
from ..run import Row, admit, speed
from . import attention, memory
from .machine import Peaks, describe, slug
from .timing import EventWatch, Watch, measure
from .worker import LostError, Worker

FAMILIES = ("cuda", "cuda portable", "triton")  # portable: without the kernels that only Hopper runs
TIMING = "timing"
PATIENCE = 90.0  # seconds for one contender's first call, which compiles, and for timing all of a case
PARTS: dict[str, Callable[[str, torch.device, bool], list[Case]]] = {
    "forward": attention.cases,
    "backward": attention.cases,
    "masked": attention.cases,
    "decode": attention.cases,
    "norms": memory.cases,
    "rope": memory.cases,
}


def run_case(
    case: Case,
    watch: Watch,
    peaks: Peaks,
    budget_s: float,
    tell: Callable[[str], None] = lambda name: None,
    lost: Mapping[str, str] | None = None,
) -> list[Row]:
    """One row per contender. The peak is measured once per run; ratios are to fastattn. Tells which contender's first call
    begins, and TIMING. lost: contenders that are not called, and why."""
    problem = case.build()
    facts: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for contender in contenders(problem):
        name = contender.name
        if lost and name in lost:
            facts[name] = {"status": "failed", "reason": lost[name]}
            continue
        tell(name)
        facts[name], prepared = admit(contender, problem)
        if prepared is not None:
            calls[name] = prepared.call
        elif facts[name]["status"] == "failed" and torch.cuda.is_available():
            torch.cuda.synchronize()  # fails where the failure has left no usable GPU: the process ends
    tell(TIMING)
    timings = measure(calls, watch, budget_s) if calls else {}
    rows = []
    for name, found in facts.items():
        if name in timings:
            found |= speed(case, timings[name], timings.get(OURS), peaks.of(case.bound, case.dtype))
        rows.append(_row(case, name, found))
    del problem, calls
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def _row(case: Case, name: str, found: dict[str, Any]) -> Row:
    place = (case.room, case.row, case.label, case.dtype, case.malloc, 0, case.bound, case.axis, case.x)
    return Row(*place, name, **found)


@functools.cache
def _tools(device: torch.device) -> tuple[EventWatch, Peaks]:
    watch = EventWatch(device)
    return watch, Peaks(device, watch)


@functools.cache
def cases_of(part: str, device: torch.device, quick: bool) -> list[Case]:
    return PARTS[part](part, device, quick)


def measured(
    tell: Callable[[Any], None], part: str, index: int, device: str, quick: bool, budget_s: float, lost: dict[str, str]
) -> list[Row]:
    """`run_case` of one case of a part, for a worker."""
    on = torch.device(device)
    return run_case(cases_of(part, on, quick)[index], *_tools(on), budget_s, tell, lost)


def rows_of_survivors(worker: Worker, case: Case, index: int, *order: Any) -> list[Row]:
    """`measured` by the worker; a contender that is the end of its process fails, and the others begin again."""
    part, device, quick, budget_s = order
    lost: dict[str, str] = {}
    while True:
        try:
            return list(worker(part, index, device, quick, budget_s, lost))
        except LostError as loss:
            if loss.last in (None, TIMING) or loss.last in lost:  # nobody knows who it was
                when = "while all were timed" if loss.last == TIMING else "before the first call"
                return [_row(case, OURS, {"status": "failed", "reason": f"lost {when}: {loss}"})]
            lost[loss.last] = f"lost: {loss}"


def contenders(problem: Problem) -> list[Contender]:
    """Those of the problem, and fastattn once more forced to each of its families of GPU kernels."""
    ours, *rivals = problem.contenders
    assert ours.name == OURS
    return [ours, *(_forced(ours, family) for family in FAMILIES), *rivals]


@contextlib.contextmanager
def _family(name: str) -> Iterator[None]:
    backend, _, portable = name.partition(" ")
    with fastattn.use_backend(backend), cuda.portable() if portable else contextlib.nullcontext():
        yield


def _forced(ours: Contender, family: str) -> Contender:
    def prepare() -> Prepared:
        with _family(family):
            try:
                prepared = ours.prepare()
                prepared.call()
            except fastattn.UnsupportedError as refusal:
                raise AbsentError(str(refusal).splitlines()[0]) from None

        def call() -> object:
            with _family(family):
                return prepared.call()

        return Prepared(call, prepared.results)

    return Contender(f"{OURS} {family}", prepare)


def write(out: Path, part: str, facts: dict[str, Any], rows: list[Row]) -> None:
    """<part>.jsonl: the machine first, then a row per line; <part>.md: the same as a table."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"machine": facts}), *(json.dumps(row.as_dict()) for row in rows)]
    (out / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    software = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = f"# {part}\n\n{facts['gpu']}, fastattn at {facts['commit']}, {software}. {facts['date']}.\n\n"
    remarks = "".join(f"\n- {note}" for note in report.notes(rows))
    (out / f"{part}.md").write_text(head + report.markdown_table(rows) + "\n" + remarks + ("\n" if remarks else ""))


__all__ = ["PARTS", "Peaks", "cases_of", "describe", "measured", "rows_of_survivors", "run_case", "slug", "write"]
