"""Measure every operation against its rivals: a table, JSON lines, plots and a Markdown report.

All contenders of a case run interleaved in one process and are first held to float64; a wrong result gets no time.
Exit code 0: fine, 1: some result of fastattn was wrong or failed, 2: bad arguments.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

ROOMS = ("attention", "layer_norm", "rms_norm", "rope", "latency")
DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one or two shapes per row, about a minute")
    parser.add_argument(
        "--op", nargs="+", action="extend", choices=ROOMS, metavar="OP", help="only these of %(choices)s"
    )
    parser.add_argument(
        "--dtype", nargs="+", action="extend", choices=DTYPES, metavar="DTYPE", help="only these of %(choices)s"
    )
    parser.add_argument("--row", nargs="+", action="extend", help="only rows with these names, such as decode")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for what is written")
    parser.add_argument("--budget", type=float, help="most seconds of timing per case (default 8, with --quick 0.5)")


def run(arguments: argparse.Namespace) -> int:
    try:
        importlib.import_module("fastattn.benchmarks.run")
    except ImportError as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    from fastattn.benchmarks import machine, report
    from fastattn.benchmarks.run import run_all, select

    if arguments.budget is not None and arguments.budget <= 0:
        print(f"bench: --budget must be greater than 0, got {arguments.budget}", file=sys.stderr)
        return 2
    cases = select(arguments.op or (), arguments.dtype or (), arguments.quick)
    if arguments.row:
        known = sorted({case.row for case in cases})
        if unknown := set(arguments.row) - set(known):
            print(f"bench: --row must be one of {known}, got {sorted(unknown)}", file=sys.stderr)
            return 2
        cases = [case for case in cases if case.row in arguments.row]
    if not cases:
        print("bench: no case has this op and dtype", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    budget = arguments.budget or (0.5 if arguments.quick else 8.0)
    rows = []
    with _Progress(len(cases)) as progress:
        for found in run_all(cases, budget_s=budget, progress=progress.begin, quick=arguments.quick):
            rows += found
            progress.done()
    return _finish(arguments.out, machine.describe(), rows, report)


def _finish(out: Path, machine, rows, report) -> int:
    from fastattn.benchmarks import plots
    from fastattn.benchmarks.case import OURS

    report.write_jsonl(out / "results.jsonl", machine, rows)  # before the table, whose reader may leave
    why = plots.available()
    drawn = [] if why else plots.draw(rows, out)
    (out / "report.md").write_text(report.markdown(machine, rows, [path.name for path in drawn]))
    print(report.table(rows))
    for note in [*report.notes(rows), *report.warnings(rows)]:
        print(f"  {note}")
    print(f"\nwritten: {out / 'results.jsonl'}, {out / 'report.md'}", *(f", {path}" for path in drawn), sep="")
    if why:
        print(f"no plots: {why}")
    wrong = [row for row in rows if row.contender == OURS and row.status != "ok"]
    for row in wrong:
        print(
            f"bench: fastattn {row.status}: {row.room}, {row.row}: {row.label} {row.dtype}: {row.reason}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


class _Progress:
    """tqdm in a terminal where it is installed, else one line per case; on stderr, so that the table can be piped."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.start = total, 0, time.perf_counter()
        self.bar = None
        try:
            from tqdm import tqdm

            if sys.stderr.isatty():
                self.bar = tqdm(total=total, unit="case", file=sys.stderr, dynamic_ncols=True)
        except ImportError:
            pass

    def begin(self, key: str) -> None:
        if self.bar is not None:
            self.bar.set_description(key[:60])
        else:
            elapsed = time.perf_counter() - self.start
            print(f"[{self.count + 1}/{self.total}] {elapsed:.0f} s {key}", file=sys.stderr, flush=True)

    def done(self) -> None:
        self.count += 1
        if self.bar is not None:
            self.bar.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
