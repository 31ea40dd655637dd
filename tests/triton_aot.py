"""Compile every Triton kernel for a GPU that need not be there, and hold it to the limits of that GPU.

    python tests/triton_aot.py [--arch 80 90 100] [--room norm_rope attention ...] [--all] [--quiet] [--at-most N]

Records the launches of the rooms' tuning rows (tests/aot_<room>.py), compiles each distinct one, and prints registers,
stack (where spills live) and shared memory. Exit code 1 when a kernel spills, does not fit, or lacks the tensor
instructions of its architecture. Without --all a sample; with it every row, dtype and option that changes the code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels cannot be compiled
sys.path.insert(0, str(Path(__file__).parent))

from fastattn.runtime import aot
from fastattn.runtime.launch import Launch

ROOMS = ("norm_rope", "attention", "decode")


def distinct(room: str, arch: int, *, everything: bool) -> Iterator[Launch]:
    """The room's launches that compile to different code."""
    seen = set()
    for launch in importlib.import_module(f"aot_{room}").launches(arch, everything=everything):
        key = aot.key(launch)
        if key not in seen:
            seen.add(key)
            yield launch


def faults(built: aot.Compiled, launch: Launch) -> list[str]:
    """What a compiled kernel, or its launch, does wrong."""
    found = built.faults()
    if launch.kernel.arg_names[len(launch.args) :] != list(launch.constants):
        found.append(f"constants out of order: {list(launch.constants)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--room", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--all", action="store_true", help="every tuning row, dtype and option")
    parser.add_argument("--quiet", action="store_true", help="print the kernels at fault alone")
    parser.add_argument("--at-most", type=int, help="so many kernels per room and architecture, spread evenly")
    options = parser.parse_args()
    bad = count = 0
    for arch in options.arch:
        for room in options.room:
            chosen = list(distinct(room, arch, everything=options.all))
            for launch in chosen[:: -(-len(chosen) // options.at_most) if options.at_most else 1]:
                start = time.perf_counter()
                built = aot.compile_launch(launch, arch)
                wrong = faults(built, launch)
                if wrong or not options.quiet:
                    seconds = time.perf_counter() - start
                    print(f"{built}, {seconds:.1f} s  {_constants(launch)}  {'; '.join(wrong)}", flush=True)
                bad += bool(wrong)
                count += 1
    print(f"{count} kernels compiled, {bad} at fault")
    return 1 if bad else 0


def _constants(launch: Launch) -> str:
    return " ".join(f"{name}={value}" for name, value in launch.constants.items())


if __name__ == "__main__":
    sys.exit(main())
