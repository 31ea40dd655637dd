"""Rows as a table on a terminal, as JSON lines and as a Markdown report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .case import OURS
from .machine import Machine
from .run import Row

HEAD = ("work", "dtype", "fastattn", "rate", "of attainable", "times slower than fastattn")


def write_jsonl(path: Path, machine: Machine, rows: Iterable[Row]) -> None:
    """The machine on the first line, then one row per line."""
    lines = [json.dumps({"machine": machine.as_dict()}), *(json.dumps(row.as_dict()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def read_jsonl(path: Path) -> tuple[Machine, list[Row]]:
    first, *rest = path.read_text().splitlines()
    return Machine(**json.loads(first)["machine"]), [Row(**json.loads(line)) for line in rest]


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.room, row.row, row.label, row.dtype, row.malloc, row.threads), []).append(row)
    return list(cases.values())


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def line(case: Sequence[Row]) -> tuple[str, ...]:
    """One line of the table for all contenders of a case."""
    ours = next(row for row in case if row.contender == OURS)
    place = f"{ours.room}, {ours.row}: {ours.label}"
    if ours.malloc != "default":
        place += f", malloc {ours.malloc}"
    if ours.axis == "threads":
        place += f", {ours.threads} threads"
    time = _time(ours)
    rate = "" if ours.rate is None else _rate(ours.rate, "FLOP/s" if ours.bound == "flops" else "B/s")
    # A busy machine slows the peak and the sample by different amounts, so their quotient says nothing.
    share = "" if ours.share is None or ours.noisy else f"{100 * ours.share:.0f} %"
    return place, ours.dtype, time, rate, share, " · ".join(_rival(row) for row in case if row.contender != OURS)


def _rate(giga: float, unit: str) -> str:
    return f"{giga / 1e3:.4g} T{unit}" if giga >= 1e4 else f"{giga:.0f} G{unit}"


def _time(row: Row) -> str:
    if row.status != "ok" or row.seconds is None:
        return row.status
    spread = 50 * ((row.p80 or 0.0) - (row.p20 or 0.0)) / row.seconds
    return f"{'~' if row.noisy else ''}{duration(row.seconds)} ± {spread:.0f} %"


def _rival(row: Row) -> str:
    if row.status != "ok":
        return f"{row.contender} {row.status}"
    time = f"{row.ratio:.2f}x" if row.ratio is not None else duration(row.seconds or 0.0)
    # Ratios of errors say something only where errors differ: a correctly rounded plain result makes them jump.
    sloppy = f" ({row.error_ratio:.0f}x the error)" if row.error_ratio and row.error_ratio > 4 else ""
    return f"{row.contender} {time}{sloppy}"


def table(rows: Iterable[Row]) -> str:
    """Aligned columns for a terminal."""
    lines = [HEAD, *(line(case) for case in by_case(rows))]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(HEAD) - 1)]
    rule = (*tuple("-" * width for width in widths), "-" * len(HEAD[-1]))
    out = []
    for cells in [lines[0], rule, *lines[1:]]:
        out.append("  ".join([c.ljust(w) for c, w in zip(cells, widths, strict=False)] + [cells[-1]]).rstrip())
    return "\n".join(out)


def markdown_table(rows: Iterable[Row]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *(line(case) for case in by_case(rows))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def notes(rows: Iterable[Row]) -> list[str]:
    """Every absence, failure and wrong result with its reason; places that share a reason share a line."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in rows:
        if row.status != "ok":
            places = found.setdefault((row.contender, row.status, row.reason), {})
            places.setdefault(f"{row.room} {row.row} {row.dtype}")
    return [f"{name} {status} ({', '.join(places)}): {reason}" for (name, status, reason), places in found.items()]


def warnings(rows: Iterable[Row]) -> list[str]:
    """What a reader must know before believing a time."""
    timed = [row for row in rows if row.seconds is not None]
    noisy = [row for row in timed if row.noisy]
    if not noisy:
        return []
    advice = (
        "the machine was busy, and these times prove nothing" if 2 * len(noisy) > len(timed) else "measure them again"
    )
    return [f"~ marks {len(noisy)} of {len(timed)} times without three quiet samples: {advice}"]


def markdown(machine: Machine, rows: Sequence[Row], plots: Sequence[str]) -> str:
    software = ", ".join(f"{k} {v}" for k, v in machine.versions.items() if v)
    parts = [
        "# fastattn, measured",
        f"{machine.cpu}, {machine.threads} of {machine.cores} cores, instruction set {machine.isa}, "
        f"huge pages {machine.huge_pages}. fastattn {machine.fastattn}"
        f"{f' at {machine.commit}' if machine.commit else ''}, Python {machine.python}, {software}. {machine.date}.",
        "Medians of quiet samples, all contenders interleaved in one process; ± is half the distance of the 20 % and "
        "80 % quantiles. A result counts only if its error against float64 is lawful (docs/numerics.md). Attainable is "
        "the multiply-add peak, or the copy or read bandwidth, measured in the same run.",
    ]
    for room in dict.fromkeys(row.room for row in rows):
        parts += [f"## {room}", markdown_table(row for row in rows if row.room == room)]
    if plots:
        parts += ["## Plots", "\n".join(f"![{Path(p).stem}]({p})" for p in plots)]
    if remarks := [*notes(rows), *warnings(rows)]:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in remarks)]
    return "\n\n".join(parts) + "\n"
