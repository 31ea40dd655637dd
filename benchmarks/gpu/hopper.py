"""Try the rows of the attention kernels on a Hopper GPU against each other and print the winner of each cell.

    python -m fastattn.benchmarks.gpu.hopper --out FOLDER [--headdim 64 128 192 256] [--kind dense band general pairs bias]
                                             [--phase forward backward portable] [--seqlen 1024 8192] [--at-most 40] [--until S]

Every candidate is compiled first, on all cores; those that spill or whose products the compiler serialises are out. The others
are held against float32 on one head and then timed, interleaved, over 16k tokens. The forward's candidates are those that the
model of `cycles` rates highest. One that hangs the GPU, or fails in a way that leaves it unusable, is refused and the others
begin again in a new process. FOLDER/rows-<phases>.jsonl holds every candidate, so that a winner can be doubted.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastattn
from fastattn.ops.attention import reference, tuning_cuda_bwd, tuning_sm90, tuning_sm90_bwd
from fastattn.runtime import audit, cuda, gpu, jit

from . import cycles
from .machine import describe
from .timing import EventWatch, Watch, compilers, measure
from .worker import LostError, Worker

HEADS = {64: (64, 64), 96: (96, 96), 128: (128, 128), 192: (192, 128), 256: (256, 256)}
# As `problem` makes them: nothing, causal, softcap, padding, by pair.
KINDS = ("dense", "band", "general", "pairs", "bias")
BACKWARD_KINDS = dict(zip(KINDS, ("plain", "plain", "pairs", "masked", "masked"), strict=True))  # as its rows name them
PHASES = ("forward", "backward", "portable")  # portable: the backward for every GPU
TOKENS, WIDTH, TOLERANCE = 16384, 2048, 2e-2
PATIENCE = 60.0  # seconds for one candidate's first call, and for timing all of a cell
TIMING = "timing"
KERNELS = {
    "forward": "attention_fwd_sm90_kernel",
    "backward": "attention_bwd_sm90_kernel",
    "portable": "attention_bwd_dkdv_kernel",
}


class Candidate(NamedTuple):
    """One row for one cell."""

    phase: str
    headdim: int
    kind: str
    row: Any

    @contextlib.contextmanager
    def tried(self) -> Iterator[None]:
        rows: Any = {"forward": tuning_sm90, "backward": tuning_sm90_bwd, "portable": tuning_cuda_bwd}[self.phase]
        with cuda.portable() if self.phase == "portable" else contextlib.nullcontext(), rows.tried(self.row):
            yield


def candidates(phase: str, headdim: int, kind: str, at_most: int) -> list[Candidate]:
    """Today's row first, then the most promising ones."""
    if phase == "backward":
        rows: list[Any] = list(tuning_sm90_bwd.candidates(*HEADS[headdim], BACKWARD_KINDS[kind]))
    elif phase == "portable":
        rows = tuning_cuda_bwd.candidates(90, max(HEADS[headdim]), kind not in ("dense", "band"))
    else:
        used, *others = tuning_sm90.candidates(*HEADS[headdim], kind)
        ways = [r for r in others if r[3:6] == used[3:6]]  # of the same tile: the model cannot tell these apart
        tiles = [r for r in others if r[3:6] != used[3:6]]
        rows = [used, *ways, *sorted(tiles, key=lambda r: -cycles.tflops(r, 4096, exposed=cycles.EXPOSED))]
    return [Candidate(phase, headdim, kind, row) for row in rows[:at_most]]


def problem(
    c: Candidate, seqlen: int, device: str, create: Callable[..., torch.Tensor] = torch.randn
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v and the options of a call of this cell."""
    headdim, headdim_v = HEADS[c.headdim]
    batch, heads = max(1, TOKENS // seqlen), max(1, WIDTH // headdim)
    tensors = [
        create((batch, seqlen, heads, width), dtype=torch.bfloat16, device=device).requires_grad_(c.phase != "forward")
        for width in (headdim, headdim, headdim_v)
    ]
    options: dict[str, dict[str, Any]] = {
        "dense": {},
        "band": {"causal": True},
        "general": {"softcap": 30.0},
        "pairs": {"mask": (torch.arange(seqlen, device=device) % 7 > 0).expand(batch, 1, 1, seqlen)},
        "bias": {},
    }
    if c.kind == "bias":
        options["bias"]["bias"] = create((heads, seqlen, seqlen), dtype=torch.bfloat16, device=device)
    return tensors, options[c.kind]


def compiles(c: Candidate) -> dict[str, Any]:
    """Registers, stack and shared memory of the candidate's kernel, or why it is out. Any process can; it fills the cache."""
    tensors, options = problem(c, 256, "cpu", torch.empty)
    with cuda.recording(90) as recorded, c.tried(), torch.set_grad_enabled(c.phase != "forward"):
        o = fastattn.attention(*tensors, backend="cuda", **options)
        if c.phase != "forward":
            torch.autograd.grad(o, tensors, o)
    kernels = [launch.kernel for launch in recorded.launches if launch.kernel.name == KERNELS[c.phase]]
    if not kernels:
        return {"refused": "not launched"}
    kernel = kernels[0]
    try:
        built = jit.load(kernel, "sm_90a")
    except RuntimeError as failure:  # a row that the compiler refuses is an answer, not an error
        return {"refused": str(failure).strip().splitlines()[-1][:160]}
    registers, stack, _, _ = audit.dump(built.image)
    facts: dict[str, Any] = {"registers": registers, "stack": stack, "shared": kernel.shared}
    if stack or "C75" in built.log:
        facts["refused"] = f"{stack} bytes of stack; {built.log.strip()[:160]}"
    return facts


def _call(c: Candidate, tensors: list[torch.Tensor], options: dict[str, Any]) -> Callable[[], Any]:
    if c.phase == "forward":

        def forward() -> Any:
            with c.tried():
                return (fastattn.attention(*tensors, backend="cuda", **options),)

        return forward
    o = fastattn.attention(*tensors, backend="cuda", **options)
    do = torch.ones_like(o)

    def backward() -> Any:
        with c.tried():
            return torch.autograd.grad(o, tensors, do, retain_graph=True)

    return backward


def truth(c: Candidate, tensors: list[torch.Tensor], options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Of the first head of the first sequence, in float32."""
    few = [t.detach()[:1, :, :1].float().requires_grad_(t.requires_grad) for t in tensors]
    given = {name: value[:1] if name in ("mask", "bias") else value for name, value in options.items()}
    o: Any = reference.attention(*few, **given)
    return (o,) if c.phase == "forward" else torch.autograd.grad(o, few, torch.ones_like(o))


def tflops(c: Candidate, seqlen: int, seconds: float) -> float:
    headdim, headdim_v = HEADS[c.headdim]
    pairs = max(1, TOKENS // seqlen) * max(1, WIDTH // headdim) * seqlen * seqlen / (2 if c.kind == "band" else 1)
    products = headdim + headdim_v if c.phase == "forward" else 3 * headdim + 2 * headdim_v
    return 2 * products * pairs / seconds / 1e12


def contest(
    tell: Callable[[Any], None],
    group: list[Candidate],
    facts: dict[Candidate, dict[str, Any]],
    seqlen: int,
    device: str,
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """Every candidate's facts and rate at this length, in the order of the group; wrong results are refused, not timed.

    Tells the index of the candidate whose first call begins, and TIMING when all are right and timing begins."""
    tensors, options = problem(group[0], seqlen, device)
    right, calls, found = truth(group[0], tensors, options), {}, []
    for i, c in enumerate(group):
        known = {
            "phase": c.phase,
            "headdim": c.headdim,
            "kind": c.kind,
            "seqlen": seqlen,
            "row": str(c.row),
            **facts[c],
        }
        found.append(known)
        if "refused" in known:
            continue
        tell(i)
        try:
            call = _call(c, tensors, options)
            errors = [
                float((x[:1, :, :1].float() - y).abs().max() / y.abs().max())
                for x, y in zip(call(), right, strict=True)
            ]
            if not max(errors) <= TOLERANCE:
                known["refused"] = f"wrong: relative errors {errors}"
            else:
                calls[str(i)] = call
        except Exception as failure:
            known["refused"] = f"{type(failure).__name__}: {str(failure)[:160]}"
            if device == "cuda":
                torch.cuda.synchronize()  # fails where the failure has left no usable GPU: the process ends
    tell(TIMING)
    watch = watch or EventWatch(torch.device(device, torch.cuda.current_device()))
    for name, timing in (measure(calls, watch, 1.5) if calls else {}).items():
        found[int(name)]["tflops"] = tflops(group[0], seqlen, timing.median)
    return found


def contest_of_survivors(
    worker: Worker, group: list[Candidate], facts: dict[Candidate, dict[str, Any]], seqlen: int
) -> list[dict[str, Any]]:
    """`contest` by the worker; whoever is the end of its process is refused in `facts`, and the others begin again."""
    while True:
        try:
            return list(worker(group, facts, seqlen, "cuda"))
        except LostError as loss:
            # while all are timed nobody knows who it was: today's row goes on alone
            lost = group[1:] if loss.last == TIMING else [group[loss.last]] if loss.last is not None else []
            lost = [c for c in lost if "refused" not in facts[c]]
            if not lost:
                raise
            for c in lost:
                facts[c]["refused"] = f"lost: {loss}"


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.benchmarks.gpu.hopper", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--headdim", type=int, nargs="+", default=[64, 128, 192, 256], choices=tuple(HEADS))
    parser.add_argument("--kind", nargs="+", default=["dense", "band"], choices=KINDS)
    parser.add_argument("--phase", nargs="+", default=["forward", "backward"], choices=PHASES)
    parser.add_argument("--seqlen", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--at-most", type=int, default=40, help="candidates per cell")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--until", type=float, default=540.0, help="begin no cell after so many seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available() or gpu.arch_of(torch.cuda.current_device()) != 90:
        print("hopper: no GPU of compute capability 9.0 that torch can use", file=sys.stderr)
        return 2
    begin, device = time.perf_counter(), torch.device("cuda", torch.cuda.current_device())
    worker, winners = Worker(contest, PATIENCE), []
    options.out.mkdir(parents=True, exist_ok=True)
    cells = list(itertools.product(options.phase, options.headdim, options.kind))
    with (
        ProcessPoolExecutor(
            compilers(), mp_context=multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(10,)
        ) as pool,
        (options.out / f"rows-{'-'.join(options.phase)}.jsonl").open("w") as log,
    ):
        log.write(json.dumps({"machine": describe(device)}) + "\n")
        pending = {cell: [(c, pool.submit(compiles, c)) for c in candidates(*cell, options.at_most)] for cell in cells}
        for cell, waiting in pending.items():
            if time.perf_counter() - begin > options.until:
                for _, future in waiting:
                    future.cancel()
                print(f"hopper: {cell} not begun after {options.until:.0f} s", file=sys.stderr)
                continue
            facts = {c: future.result() for c, future in waiting}
            for seqlen in options.seqlen:
                try:
                    found = contest_of_survivors(worker, list(facts), facts, seqlen)
                except LostError as loss:
                    print(f"hopper: {cell} {seqlen} given up: {loss}", file=sys.stderr, flush=True)
                    continue
                log.writelines(json.dumps(known) + "\n" for known in found)
                log.flush()
                timed = sorted((k for k in found if "tflops" in k), key=lambda k: -k["tflops"])
                today = found[0].get("tflops", float("nan"))
                winners += timed[:1]
                print(
                    f"{cell} {seqlen}: today's row {today:.0f} TFLOP/s; "
                    + "; ".join(f"{k['tflops']:.0f} {k['row']}" for k in timed[:3]),
                    flush=True,
                )
    worker.stop()
    for known in winners:
        print("winner: {phase} headdim {headdim} {kind} {seqlen}: {tflops:.0f} TFLOP/s, {row}".format(**known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
