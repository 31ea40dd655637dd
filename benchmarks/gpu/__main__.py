"""Measure one part on the GPU: python -m fastattn.benchmarks.gpu forward --out FOLDER [--quick] [--budget S].

Writes FOLDER/<part>.jsonl after every case, so that a run that is cut short loses nothing, and prints the table. A contender
that hangs the GPU, or fails in a way that leaves it unusable, takes only its process along; the others begin again.
Exit code 0: fine, 1: some result of fastattn was wrong or failed, 2: no GPU or bad arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from .. import report
from ..case import OURS
from .machine import describe
from .run import PARTS, PATIENCE, cases_of, measured, rows_of_survivors, write
from .worker import Worker


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m fastattn.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for what is written")
    parser.add_argument("--quick", action="store_true", help="a few cells of the grid")
    parser.add_argument("--budget", type=float, default=1.0, help="most seconds of timing per case")
    parser.add_argument("--until", type=float, help="begin no case after so many seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: no GPU that torch can use", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts, begin, worker = describe(device), time.perf_counter(), Worker(measured, PATIENCE)
    rows, left = [], 0
    for index, case in enumerate(cases_of(options.part, device, options.quick)):
        if options.until and time.perf_counter() - begin > options.until:
            left += 1
            continue
        rows += rows_of_survivors(worker, case, index, options.part, str(device), options.quick, options.budget)
        print("  ".join(report.line(report.by_case(rows)[-1])), flush=True)
        write(options.out, options.part, facts, rows)
    worker.stop()
    if left:
        print(f"gpu: {left} cases not begun after {options.until:.0f} s", file=sys.stderr)
    for note in report.notes(rows):
        print(f"  {note}")
    return 1 if any(row.contender == OURS and row.status != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
