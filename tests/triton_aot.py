"""Compile every Triton kernel for a GPU that need not be there, and hold it to the limits of that GPU.

    python tests/triton_aot.py [--arch 80 90 100] [--room norm_rope ...] [--all] [--quiet] [--at-most N] [--jobs N]

Records the launches of the rooms' tuning rows (tests/aot_<room>.py), compiles each distinct one, and prints registers,
stack (where spills live) and shared memory. Exit code 1 when a kernel spills, does not fit, or lacks the tensor
instructions of its architecture. Without --all a sample; with it every row, dtype and option that changes the code: on as
many processes as there are cores, which is hours of one core. Triton's cache keeps what was compiled, so that a run which
was broken off goes on where it was, and a later one compiles what has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels cannot be compiled
sys.path.insert(0, str(Path(__file__).parent))

import torch

from fastattn.runtime import aot
from fastattn.runtime.launch import Launch

ROOMS = ("norm_rope", "attention", "decode")
TENSOR = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def distinct(room: str, arch: int, *, everything: bool) -> Iterator[Launch]:
    """The room's launches that compile to different code."""
    seen = set()
    for launch in importlib.import_module(f"aot_{room}").launches(arch, everything=everything):
        key = aot.key(launch)
        if key not in seen:
            seen.add(key)
            yield replace(
                launch, tensors=tuple(None if t is None else _like(t.dtype, t.data_ptr() % 16) for t in launch.tensors)
            )


@functools.cache
def _like(dtype: torch.dtype, offset: int) -> torch.Tensor:
    """What a kernel is specialised on, without the memory: masks and biases of all launches are 100 GB of addresses."""
    return torch.empty(32, dtype=torch.uint8)[offset : offset + 16].view(dtype)


def product(launch: Launch, arch: int) -> str | None:
    """What the products of a kernel should be compiled to, None where they need no tensor cores. Those of 90 and 100
    multiply 64 rows or more at a time; smaller tiles are left to the instruction that all have."""
    tile = launch.constants
    if "TF32" not in tile or (launch.tensors[0].dtype == torch.float32 and not tile["TF32"]):
        return None
    rows = tile["BLOCK_N" if "dkdv" in launch.kernel.__name__ else "BLOCK_M"]
    return TENSOR[arch if rows >= 64 else 80]


def faults(built: aot.Compiled, launch: Launch, arch: int) -> list[str]:
    """What a compiled kernel, or its launch, does wrong."""
    found = built.faults()
    expected = product(launch, arch)
    if expected and not built.count(expected):
        found.append(f"no {expected} in it")
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
    parser.add_argument("--jobs", type=int, help="so many processes; all cores with --all, else one")
    options = parser.parse_args()
    for arch in options.arch:
        for room in options.room:
            chosen = list(distinct(room, arch, everything=options.all))
            step = -(-len(chosen) // options.at_most) if options.at_most else 1
            _chosen.extend((launch, arch) for launch in chosen[::step])
    jobs = options.jobs or ((os.cpu_count() or 1) if options.all else 1)
    with multiprocessing.get_context("fork").Pool(jobs) if jobs > 1 else contextlib.nullcontext() as pool:
        results = map(_compile, range(len(_chosen))) if pool is None else pool.imap(_compile, range(len(_chosen)))
        bad = 0
        for line, wrong in results:
            if wrong or not options.quiet:
                print(line, flush=True)
            bad += wrong
    print(f"{len(_chosen)} kernels compiled, {bad} at fault")
    return 1 if bad else 0


_chosen: list[tuple[Launch, int]] = []  # forked processes find it here: launches cannot be sent to them


def _compile(index: int) -> tuple[str, bool]:
    """What is to be said of one of the chosen, and whether it is at fault."""
    launch, arch = _chosen[index]
    start = time.perf_counter()
    built = aot.compile_launch(launch, arch)
    wrong = faults(built, launch, arch)
    seconds = time.perf_counter() - start
    return f"{built}, {seconds:.1f} s  {_constants(launch)}  {'; '.join(wrong)}", bool(wrong)


def _constants(launch: Launch) -> str:
    return " ".join(f"{name}={value}" for name, value in launch.constants.items())


if __name__ == "__main__":
    sys.exit(main())
