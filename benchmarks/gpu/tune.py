"""Find the tiles of the Triton attention kernels on this GPU and print rows for fastattn/ops/attention/tuning.py.

    python -m fastattn.benchmarks.gpu.tune --out FOLDER [--headdim 64 128 256] [--kind dense band pairs] [--until S]

Every candidate is compiled first, on all cores; those that spill or do not fit are out. The others are timed one kernel
at a time, interleaved, at 16k tokens, and the fastest once more beside persistent grids of the same tile.
FOLDER/tune.jsonl holds every candidate, so that a winner can be doubted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastattn
from fastattn.ops.attention import tuning
from fastattn.runtime import launch

from .machine import describe
from .timing import EventWatch, compilers, measure

PHASES = {"fwd": "attention_fwd_kernel", "dq": "attention_bwd_dq_kernel", "dkdv": "attention_bwd_dkdv_kernel"}
PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4}  # of 2 · headdim operations per pair
KINDS = ("dense", "band", "pairs")
SEQLEN, TOKENS, WIDTH = 4096, 16384, 2048


class Candidate(NamedTuple):
    """One tile for one kernel of one kind of call."""

    headdim: int
    kind: str
    phase: str
    tile: tuning.Tile

    def instead_of(self, usual: tuning.Row) -> tuning.Row:
        """The other kernels keep their tiles, which are compiled and fit."""
        changed: dict[str, Any] = {self.phase: self.tile, "source": "under trial"}
        return usual._replace(**changed)


def candidates(headdim: int, kind: str, phase: str) -> list[Candidate]:
    sizes = (32, 64, 128) if headdim <= 128 else (16, 32, 64, 128)
    tiles = itertools.product((64, 128, 256) if phase == "fwd" else sizes, sizes, (4, 8), (1, 2, 3, 4))
    fits = [tuning.Tile(*t) for t in tiles if t[0] * t[1] <= 128 * 128 and t[0] * t[1] // (32 * t[2]) <= 128]
    return [Candidate(headdim, kind, phase, tile) for tile in fits]


def persistent(candidate: Candidate) -> list[Candidate]:
    """The same tile in grids of one and of two programs per multiprocessor."""
    return [candidate._replace(tile=candidate.tile._replace(RESIDENT=n)) for n in (1, 2)]


@contextlib.contextmanager
def tried(candidate: Candidate) -> Iterator[None]:
    """Every call uses the candidate's tile for the candidate's kernel."""
    usual = tuning.row
    tuning.row = lambda *call: candidate.instead_of(usual(*call))
    try:
        yield
    finally:
        tuning.row = usual


def call(candidate: Candidate, device: str) -> None:
    """One forward, and a backward when the phase is one of it."""
    heads, backward = WIDTH // candidate.headdim, candidate.phase != "fwd"
    shape = (TOKENS // SEQLEN, SEQLEN, heads, candidate.headdim)
    create = torch.randn if device == "cuda" else torch.empty
    q, k, v = (create(shape, dtype=torch.bfloat16, device=device).requires_grad_(backward) for _ in range(3))
    options: dict[str, Any] = {"causal": candidate.kind == "band"}
    if candidate.kind == "pairs":
        options["mask"] = torch.ones(shape[0], 1, 1, SEQLEN, dtype=torch.bool, device=device)
    with fastattn.use_backend("triton"):
        o = fastattn.attention(q, k, v, **options)
        if backward:
            torch.autograd.grad(o, (q, k, v), torch.ones_like(o))


def compiles(candidate: Candidate, arch: int) -> dict[str, Any]:
    """Registers, stack and shared memory of the candidate's kernel, or why it cannot be compiled. Any process can."""
    from fastattn.runtime import aot

    with launch.recording(arch) as recorded, tried(candidate):
        call(candidate, "cpu")
    (found,) = [r for r in recorded.launches if r.kernel.__name__ == PHASES[candidate.phase]]
    try:
        built = aot.compile_launch(found, arch)
    except Exception as failure:  # a tile that the compiler refuses is an answer, not an error
        return {"refused": f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:120]}"}
    facts: dict[str, Any] = {"registers": built.registers, "stack": built.stack, "shared": built.shared}
    if faults := built.faults():
        facts["refused"] = "; ".join(faults)
    return facts


def captured(candidate: Candidate) -> launch.Launch:
    """Run the call on the GPU; the launch of the candidate's kernel, to be repeated alone."""
    seen: list[launch.Launch] = []
    usual = launch.run

    def run(
        kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Any, *, num_warps: int = 4, num_stages: int = 2
    ) -> None:
        seen.append(launch.Launch(kernel, grid, tensors, numbers, constants, num_warps, num_stages))
        usual(kernel, grid, tensors, numbers, constants, num_warps=num_warps, num_stages=num_stages)

    launch.run = run
    try:
        with tried(candidate):
            call(candidate, "cuda")
    finally:
        launch.run = usual
    return next(s for s in seen if s.kernel.__name__ == PHASES[candidate.phase])


def again(found: launch.Launch) -> Any:
    what = (found.kernel, found.grid, found.tensors, found.numbers, found.constants)
    return lambda: launch.run(*what, num_warps=found.num_warps, num_stages=found.num_stages)


def tflops(candidate: Candidate, seconds: float) -> float:
    pairs = TOKENS * SEQLEN / (2 if candidate.kind == "band" else 1)
    return 2 * PRODUCTS[candidate.phase] * pairs * WIDTH / seconds / 1e12


def ranked(group: list[Candidate], facts: dict[Candidate, dict[str, Any]], watch: EventWatch) -> list[Candidate]:
    """Time the group and note the rates in `facts`; those that ran, the fastest first."""
    alive = [c for c in group if "refused" not in facts[c]]
    calls = {}
    for c in alive:
        try:
            calls[str(c.tile)] = again(captured(c))
            calls[str(c.tile)]()
            torch.cuda.synchronize()
        except Exception as failure:
            facts[c]["refused"] = f"{type(failure).__name__}: {str(failure)[:120]}"
            calls.pop(str(c.tile), None)
    timings = measure(calls, watch, 1.5)
    for c in alive:
        if str(c.tile) in timings:
            facts[c]["tflops"] = tflops(c, timings[str(c.tile)].median)
    timed = [c for c in alive if "tflops" in facts[c]]
    return sorted(timed, key=lambda c: facts[c]["tflops"], reverse=True)


def best(
    group: list[Candidate], facts: dict[Candidate, dict[str, Any]], watch: EventWatch, pool: Executor, arch: int
) -> Candidate | None:
    """The fastest of the group, or its tile in a persistent grid where that is faster."""
    final = ranked(group, facts, watch)[:1]
    more = [resident for candidate in final for resident in persistent(candidate)]
    facts.update(zip(more, pool.map(compiles, more, itertools.repeat(arch)), strict=True))
    return next(iter(ranked([*final, *more], facts, watch)), None)


def processes(n: int, niceness: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n, mp_context=spawn, initializer=os.nice, initargs=(niceness,))


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m fastattn.benchmarks.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--headdim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--phase", nargs="+", default=list(PHASES), choices=tuple(PHASES))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--until", type=float, default=540.0, help="begin no group after so many seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: no GPU that torch can use", file=sys.stderr)
        return 2
    device, begin = torch.device("cuda", torch.cuda.current_device()), time.perf_counter()
    arch, machine, watch = launch.arch(device), describe(device), EventWatch(device)
    options.out.mkdir(parents=True, exist_ok=True)
    command = f"benchmarks.gpu.tune, {machine['gpu']}, {machine['date']}, {machine['commit']}"
    pool = processes(compilers(), 10)
    express = processes(2, 0)  # for what a group waits for, not to queue behind the candidates of all groups
    groups = list(itertools.product(options.headdim, options.kind, options.phase))
    pending = {g: [(c, pool.submit(compiles, c, arch)) for c in candidates(*g)] for g in groups}
    winners: dict[tuple[int, str], dict[str, tuple[tuning.Tile, float]]] = {}
    with pool, express, (options.out / "tune.jsonl").open("w") as log:
        log.write(json.dumps({"machine": machine}) + "\n")
        for group, waiting in pending.items():
            if time.perf_counter() - begin > options.until:
                for _, future in waiting:
                    future.cancel()
                print(f"tune: {group} not begun after {options.until:.0f} s", file=sys.stderr)
                continue
            facts = {c: future.result() for c, future in waiting}
            winner = best(list(facts), facts, watch, express, arch)
            for c, known in facts.items():
                log.write(json.dumps({"headdim": c.headdim, "kind": c.kind, "phase": c.phase, "tile": c.tile, **known}))
                log.write("\n")
            log.flush()
            if winner is not None:
                rate = facts[winner]["tflops"]
                winners.setdefault((winner.headdim, winner.kind), {})[winner.phase] = (winner.tile, rate)
                print(f"{winner.headdim} {winner.kind} {winner.phase}: {winner.tile} {rate:.0f} TFLOP/s", flush=True)
    for (headdim, kind), tiles in winners.items():
        rates = ", ".join(f"{phase} {rate:.0f}" for phase, (_, rate) in tiles.items())
        found = ", ".join(f"{phase}={tile!r}" for phase, (tile, _) in tiles.items())
        print(f'Row({arch}, {headdim}, "{kind}", 2, {found}, "measured: {rates} TFLOP/s; {command}"),')
    return 0


if __name__ == "__main__":
    sys.exit(main())
