"""Cases to rows on a GPU: every contender is held to float64 first, then timed beside the others."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
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
from .timing import Watch, measure

FAMILIES = ("cuda", "cuda portable", "triton")  # portable: without the kernels that only Hopper runs
PARTS: dict[str, Callable[[str, torch.device, bool], list[Case]]] = {
    "forward": attention.cases,
    "backward": attention.cases,
    "masked": attention.cases,
    "decode": attention.cases,
    "norms": memory.cases,
    "rope": memory.cases,
}


def run_case(case: Case, watch: Watch, peaks: Peaks, budget_s: float) -> list[Row]:
    """One row per contender. The peak is measured once per run; ratios are to fastattn."""
    problem = case.build()
    facts: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for contender in contenders(problem):
        facts[contender.name], prepared = admit(contender, problem)
        if prepared is not None:
            calls[contender.name] = prepared.call
    timings = measure(calls, watch, budget_s) if calls else {}
    place = (case.room, case.row, case.label, case.dtype, case.malloc, 0, case.bound, case.axis, case.x)
    rows = []
    for name, found in facts.items():
        if name in timings:
            found |= speed(case, timings[name], timings.get(OURS), peaks.of(case.bound, case.dtype))
        rows.append(Row(*place, name, **found))
    del problem, calls
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


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


__all__ = ["PARTS", "Peaks", "describe", "run_case", "slug", "write"]
