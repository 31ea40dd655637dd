"""Commit a measurement: `python -m fastattn.benchmarks.publish out/bench` in the root of the checkout.

Copies results, report and plots to benchmarks/results/<machine>/ and writes the table of README.md from them, so that
no number in the README was ever typed.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .case import OURS
from .machine import Machine
from .report import by_case, duration, read_jsonl
from .run import Row

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TORCH = ("SDPA", "F.layer_norm", "F.rms_norm", "rotate-half")  # what a model runs today


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1 or not (Path(argv[0]) / "results.jsonl").is_file():
        print("publish: the argument must be a folder that `fastattn bench --out` wrote", file=sys.stderr)
        return 2
    source = Path(argv[0])
    machine, rows = read_jsonl(source / "results.jsonl")
    if wrong := [row for row in rows if row.contender == OURS and row.status != "ok"]:
        print(f"publish: {len(wrong)} results of fastattn are not lawful; nothing was published", file=sys.stderr)
        return 1
    target = Path("benchmarks/results") / machine.slug
    target.mkdir(parents=True, exist_ok=True)
    for path in [source / "results.jsonl", source / "report.md", *sorted(source.glob("*.png"))]:
        shutil.copy(path, target / path.name)
    readme = Path("README.md")
    readme.write_text(insert(readme.read_text(), f"{summary(machine, rows)}\n\n[All of it]({target}/report.md)."))
    print(f"published in {target} and README.md")
    return 0


def insert(text: str, table: str) -> str:
    """`text` with what stands between the markers replaced."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"publish: README.md must hold {BEGIN} and {END}, got neither or one")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


def summary(machine: Machine, rows: Sequence[Row]) -> str:
    """One line per row and dtype (its first shape): time, share of the attainable, how much longer the others take.
    Below it, over all shapes, who was faster than fastattn."""
    lines = [
        f"{machine.cpu}, {machine.threads} threads, {machine.isa}, "
        f"torch {machine.versions.get('torch')}, {machine.date}:",
        "",
        "| work | dtype | fastattn | of attainable | PyTorch takes | strongest other |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    seen: set[tuple[str, str, str]] = set()
    for case in by_case(rows):
        ours = next(row for row in case if row.contender == OURS)
        place = (ours.room, ours.row, ours.dtype)
        if ours.axis or ours.seconds is None or place in seen:
            continue
        seen.add(place)
        torch_row = next((row for row in case if row.contender in TORCH and row.ratio), None)
        others = [row for row in case if row.contender not in (*TORCH, OURS) and row.ratio]
        best = min(others, key=lambda row: row.ratio or 0.0, default=None)
        cells = [
            f"{ours.room}, {ours.row}: {ours.label}",
            ours.dtype,
            f"{'~' if ours.noisy else ''}{duration(ours.seconds)}",
            "" if ours.share is None or ours.noisy else f"{100 * ours.share:.0f} %",
            "" if torch_row is None else f"{torch_row.ratio:.1f} x as long",
            "" if best is None else f"{best.contender} {best.ratio:.1f} x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if any("| ~" in line for line in lines):
        lines += ["", "~: fewer than three quiet samples."]
    ahead = [row for row in rows if row.contender != OURS and row.ratio and row.ratio < 1]
    faster = [f"{row.contender} in {row.room}, {row.row}: {row.label} {row.dtype} ({row.ratio:.2f} x)" for row in ahead]
    lines += ["", f"Of all shapes measured, faster than fastattn: {'; '.join(faster) or 'none'}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
