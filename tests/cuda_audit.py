"""Compile every CUDA C++ kernel for a GPU that need not be there, and hold it to the limits of that GPU.

    python tests/cuda_audit.py [--arch 80 90 100 120] [--room norm rope attention ...] [--all] [--fresh] [--quiet]
                               [--at-most N] [--opcodes] [--jobs N]

Records the launches of the rooms' public calls (tests/audit_<room>.py), compiles each distinct kernel, and prints
registers, stack (where spills live), shared memory, barriers and seconds of one core; at the end a table of the rooms.
Exit code 1 when a kernel spills, does not fit, lacks an instruction that its room expects, makes the compiler complain, or
(with --all) takes longer than it may. Without --all a sample; with it every head dim, dtype, mask and option that changes
the code. What an earlier run has compiled is not compiled again while its sources and the compiler are the same
(fastattn/runtime/audit.py), so a run that was stopped goes on where it was; --fresh compiles everything.

A whole run, every room for every GPU, leaves its sums in tests/audited.json. They name what was audited, so that `make test`
can tell in seconds whether each specialisation is still the one that was found clean (tests/test_cuda_audit.py).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from fastattn.runtime import audit, cuda, jit, nvrtc, sources

RECORD = Path(__file__).with_name("audited.json")
ROOMS = tuple(sorted(p.stem.removeprefix("audit_") for p in Path(__file__).parent.glob("audit_*.py")))
ARCHS = (80, 90, 100, 120)
_PROGRESS = 15.0  # seconds between two reports


class Case(NamedTuple):
    """hurried: it may not take longer to compile than is allowed."""

    room: str
    kernel: cuda.Kernel
    arch: int
    hurried: bool = False
    fresh: bool = False

    @property
    def target(self) -> str:
        return jit.target(self.kernel, self.arch)


def distinct(room: str, arch: int, *, everything: bool) -> list[cuda.Kernel]:
    """The kernels that the room launches on such a GPU, each once: with the most threads and the most shared memory of its
    launches, which its registers and the GPU must have room for."""
    found = room_of(room)
    if arch not in getattr(found, "ARCHS", ARCHS):
        return []
    kernels: dict[tuple[str, str], cuda.Kernel] = {}
    for launch in found.launches(arch, everything=everything):
        one = launch.kernel
        other = kernels.get((one.file, str(one)), one)
        most = {"threads": max(one.threads, other.threads), "shared": max(one.shared, other.shared)}
        kernels[one.file, str(one)] = dataclasses.replace(one, **most)
    return list(kernels.values())


def room_of(name: str) -> ModuleType:
    return importlib.import_module(f"audit_{name}")


def identity(kernels: list[cuda.Kernel]) -> str:
    """Of the kernels and all code that they are made of. Comments and empty lines do not count."""
    launched = [(k.file, str(k), k.threads, k.shared, k.cluster) for k in kernels]
    code = {file: {name: _bare(name) for name in sources.closure(file)} for file in {k.file for k in kernels}}
    return hashlib.sha256(json.dumps([sorted(launched), code, jit.OPTIONS], sort_keys=True).encode()).hexdigest()[:32]


def _bare(name: str) -> str:
    lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in sources.read(name).splitlines())
    return "\n".join(line for line in lines if line)


def compiler() -> str:
    return "NVRTC {}.{}".format(*nvrtc.library().version)


def faults(case: Case) -> tuple[audit.Audited | None, list[str]]:
    """The kernel compiled for the GPU (None when it cannot be), and why it should not be shipped."""
    expected = getattr(room_of(case.room), "expected", lambda kernel, arch: ())(case.kernel, case.arch)
    try:
        built = audit.audit(case.kernel, case.target, fresh=case.fresh)
    except RuntimeError as failure:
        return None, [str(failure)]
    found = built.faults(expected)
    if case.hurried and built.seconds > audit.SECONDS:
        found.append(f"{built.seconds:.1f} s to compile, {audit.SECONDS:.0f} s are allowed")
    return built, found


def _chosen(options: argparse.Namespace) -> Iterator[Case]:
    for room in options.room:
        for arch in options.arch:
            kernels = distinct(room, arch, everything=options.all)
            step = max(1, -(-len(kernels) // options.at_most)) if options.at_most else 1
            yield from (Case(room, kernel, arch, options.all, options.fresh) for kernel in kernels[::step])


class Progress:
    """Says on stderr how far the audit is, and what the compilations so far let expect of those to come."""

    def __init__(self, cases: list[Case], jobs: int):
        self.missing = [case.fresh or not audit.is_kept(case.kernel, case.target) for case in cases]
        self.jobs = jobs
        self.done = self.compiled = 0
        self.start = self.said = time.monotonic()
        print(f"{len(cases)} kernels, {sum(self.missing)} of them to compile", file=sys.stderr, flush=True)

    def one_more(self) -> None:
        self.compiled += self.missing[self.done]
        self.done += 1
        now = time.monotonic()
        if now - self.said > _PROGRESS and self.compiled:
            self.said = now
            left = sum(self.missing) - self.compiled
            minutes = left * (now - self.start) / self.compiled / 60
            print(
                f"{self.done} of {len(self.missing)}, {left} to compile: {minutes:.0f} min", file=sys.stderr, flush=True
            )


def _record(rows: list[tuple[Case, audit.Audited | None, list[str]]]) -> None:
    """The sums of a whole run without faults."""
    kernels, seconds = collections.defaultdict(list), collections.defaultdict(list)
    for case, built, _ in rows:
        kernels[case.room, case.arch].append(case.kernel)
        seconds[case.room, case.arch].append(built.seconds if built else 0.0)
    found = {
        f"{room} sm_{arch}": {
            "kernels": len(of),
            "seconds": round(sum(seconds[room, arch])),
            "slowest": round(max(seconds[room, arch]), 1),
            "identity": identity(of),
        }
        for (room, arch), of in kernels.items()
    }
    RECORD.write_text(json.dumps({"compiler": compiler(), "audited": found}, indent=1) + "\n")


def _table(rows: list[tuple[Case, audit.Audited | None, list[str]]]) -> Iterator[str]:
    rooms = collections.defaultdict(list)
    for case, built, wrong in rows:
        rooms[case.room, case.arch].append((built.seconds if built else 0.0, wrong))
    yield f"{'room':<20} {'GPU':<7} {'clean':>12} {'seconds':>8} {'slowest':>8}"
    for (room, arch), found in rooms.items():
        seconds = [s for s, _ in found]
        clean = f"{sum(not wrong for _, wrong in found)} of {len(found)}"
        yield f"{room:<20} sm_{arch:<4} {clean:>12} {sum(seconds):8.0f} {max(seconds):8.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--room", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--all", action="store_true", help="every specialisation that is shipped")
    parser.add_argument("--fresh", action="store_true", help="compile what earlier runs have compiled, too")
    parser.add_argument("--quiet", action="store_true", help="print the kernels at fault alone, and the table")
    parser.add_argument("--at-most", type=int, help="so many kernels per room and architecture, spread evenly")
    parser.add_argument("--opcodes", action="store_true", help="print the commonest instructions of each kernel, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at the same time")
    options = parser.parse_args()
    cases, rows = list(_chosen(options)), []
    progress = Progress(cases, options.jobs)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case, (built, wrong) in zip(cases, pool.map(faults, cases), strict=True):
            rows.append((case, built, wrong))
            if wrong or not options.quiet:
                print(f"{built or f'{case.kernel} sm_{case.arch}'}  {'; '.join(wrong)}", flush=True)
            if options.opcodes and built:
                print("   ", ", ".join(f"{n} {name}" for name, n in built.opcodes.most_common(16)), flush=True)
            progress.one_more()
    bad = sum(bool(wrong) for _, _, wrong in rows)
    if options.all and not bad and not options.at_most and {*options.room} == {*ROOMS} and {*options.arch} == {*ARCHS}:
        _record(rows)
    print(*_table(rows), f"{len(rows)} kernels audited, {bad} at fault", sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
