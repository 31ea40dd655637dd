"""Compile every CUDA C++ kernel for a GPU that need not be there, and hold it to the limits of that GPU.

    python tests/cuda_audit.py [--arch 80 90 100 120] [--room norm rope attention ...] [--all] [--quiet] [--at-most N]
                               [--opcodes] [--jobs N]

Records the launches of the rooms' public calls (tests/audit_<room>.py), compiles each distinct kernel, and prints
registers, stack (where spills live), shared memory, barriers and seconds of one core. Exit code 1 when a kernel spills,
does not fit, lacks an instruction that its room expects, makes the compiler complain, or (with --all) takes longer than it
may. Without --all a sample; with it every head dim, dtype, mask and option that changes the code.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))

from fastattn.runtime import audit, cuda, jit

ROOMS = tuple(sorted(p.stem.removeprefix("audit_") for p in Path(__file__).parent.glob("audit_*.py")))
ARCHS = (80, 90, 100, 120)
SECONDS = 10.0


def distinct(room: str, arch: int, *, everything: bool) -> Iterator[cuda.Kernel]:
    """The kernels that the room launches on such a GPU, each once."""
    found = room_of(room)
    if arch not in getattr(found, "ARCHS", ARCHS):
        return
    seen = set()
    for launch in found.launches(arch, everything=everything):
        key = (launch.kernel.file, str(launch.kernel))
        if key not in seen:
            seen.add(key)
            yield launch.kernel


def room_of(name: str) -> ModuleType:
    return importlib.import_module(f"audit_{name}")


def faults(room: str, kernel: cuda.Kernel, arch: int, hurried: bool) -> tuple[audit.Audited | None, list[str]]:
    """The kernel compiled for the GPU (None when it cannot be), and why it should not be shipped."""
    expected = getattr(room_of(room), "expected", lambda kernel, arch: ())(kernel, arch)
    try:
        built = audit.audit(kernel, jit.target(kernel, arch))
    except RuntimeError as failure:
        return None, [str(failure)]
    found = built.faults(expected)
    if hurried and built.seconds > SECONDS:
        found.append(f"{built.seconds:.1f} s to compile, {SECONDS:.0f} s are allowed")
    return built, found


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, cuda.Kernel, int, bool]]:
    """The arguments of `faults`."""
    for arch in options.arch:
        for room in options.room:
            kernels = list(distinct(room, arch, everything=options.all))
            step = max(1, -(-len(kernels) // options.at_most)) if options.at_most else 1
            yield from ((room, kernel, arch, options.all) for kernel in kernels[::step])


def _faults(chosen: tuple[str, cuda.Kernel, int, bool]) -> tuple[audit.Audited | None, list[str]]:
    return faults(*chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--room", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--all", action="store_true", help="every specialisation that is shipped")
    parser.add_argument("--quiet", action="store_true", help="print the kernels at fault alone")
    parser.add_argument("--at-most", type=int, help="so many kernels per room and architecture, spread evenly")
    parser.add_argument("--opcodes", action="store_true", help="print the commonest instructions of each kernel, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at the same time")
    options = parser.parse_args()
    bad, seconds, chosen = 0, [], list(_chosen(options))
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (_, kernel, arch, _), (built, wrong) in zip(chosen, pool.map(_faults, chosen), strict=True):
            if wrong or not options.quiet:
                print(f"{built or f'{kernel} sm_{arch}'}  {'; '.join(wrong)}", flush=True)
            if options.opcodes and built:
                print("   ", ", ".join(f"{n} {name}" for name, n in built.opcodes.most_common(16)), flush=True)
            bad += bool(wrong)
            seconds.append(built.seconds if built else 0.0)
    print(f"compiling took {sum(seconds):.0f} s, the slowest {max(seconds, default=0):.1f} s")
    print(f"{len(seconds)} kernels compiled, {bad} at fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
