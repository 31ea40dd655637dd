"""Compile the CUDA kernels that a model or a kind of call needs into the cache, for a GPU that need not be there.

The public calls are recorded on CPU tensors as such a GPU would launch them; nothing is computed. The cache may then be
copied to machines that have the same fastattn and NVRTC. Exit code 0: all are there, 1: something does not compile or
cannot be kept, 2: the arguments are wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

import fastattn
from fastattn.benchmarks.case import DTYPES
from fastattn.cli import warmup_model
from fastattn.cli.verify_model import Wrong
from fastattn.ops import _dispatch
from fastattn.runtime import cache, cuda, gpu, jit

# Multiprocessors of the GPU that is best known for the architecture: how work is split can depend on it.
SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 160, 120: 170}
SEQLEN, CACHED = 2048, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", help="such as sm_80 sm_90a (default: the GPUs of this machine)")
    parser.add_argument(
        "--op", nargs="+", choices=tuple(CALLS), default=list(CALLS), metavar="OP", help="the operations"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16"], metavar="DTYPE", help="some of %(choices)s"
    )
    parser.add_argument("--headdim", nargs="+", type=int, default=[128], help="of attention and rope")
    parser.add_argument("--heads", nargs=2, type=int, metavar=("Q", "KV"), default=[32, 8], help="of queries, of keys")
    parser.add_argument("--hidden", nargs="+", type=int, default=[4096], help="columns of the norms")
    parser.add_argument(
        "--model",
        help="instead of these operations: a model of transformers (a name or a folder, of which only the configuration "
        "is read), or module:function that returns a model (or a model and its batch)",
    )
    parser.add_argument("--batch", help="with --model: a .json or torch.save file with the model's keyword arguments")
    parser.add_argument("--inference", action="store_true", help="forward passes alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at the same time")
    parser.add_argument("--list", action="store_true", help="print the kernels, compile nothing")


def run(arguments: argparse.Namespace) -> int:
    try:
        archs = [_arch(name) for name in arguments.arch] if arguments.arch else _archs_here()
        launches, refusals = _recorded(arguments, archs)
    except Wrong as wrong:
        print(f"warmup: {wrong}", file=sys.stderr)
        return 2
    try:
        targets = _distinct(launches)
    except (OSError, RuntimeError) as failure:  # no NVRTC, or one that does not know the architecture
        print(f"warmup: {failure}", file=sys.stderr)
        return 1
    for refusal in refusals:
        print(f"not compiled: {refusal}", file=sys.stderr)
    if arguments.list:
        for target in targets:
            print(target)
        return 0
    place = cache.folder()
    if place is None:
        print("warmup: there is no cache to fill (FASTATTN_CUDA_CACHE)", file=sys.stderr)
        return 1
    start = time.perf_counter()
    failed = 0
    for target, outcome in _compiled(targets, arguments.jobs):
        failed += outcome.failure is not None
        print(f"{target}: {outcome}", flush=True)
    print(f"{len(targets) - failed} of {len(targets)} kernels are in {place} ({time.perf_counter() - start:.0f} s)")
    return 1 if failed else 0


def _arch(name: str) -> int:
    found = re.fullmatch(r"(?:sm_)?(\d{2,3})[af]?", name)
    if found is None or int(found[1]) < gpu.LOWEST_ARCH:
        raise Wrong(f"--arch must be an architecture such as sm_90a, not older than sm_{gpu.LOWEST_ARCH}, got {name!r}")
    return int(found[1])


def _archs_here() -> list[int]:
    if wants := gpu.objections():
        raise Wrong(f"--arch must be given: the default is that of this machine's GPU, and it wants {wants[0]}")
    return sorted({gpu.arch_of(i) for i in range(torch.cuda.device_count())})


@dataclass(frozen=True)
class Target:
    """One kernel for one architecture."""

    kernel: cuda.Kernel
    arch: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.arch}"


def _recorded(arguments: argparse.Namespace, archs: Sequence[int]) -> tuple[list[tuple[int, cuda.Launch]], list[str]]:
    """What the calls launch on these architectures, and what the CUDA kernels refuse."""
    if arguments.batch and not arguments.model:
        raise Wrong("--batch serves --model, which is not given")
    dtypes = [DTYPES[name] for name in arguments.dtype]
    models = [warmup_model.load(arguments.model, arguments.batch, d) for d in dtypes] if arguments.model else []
    launches = []
    with _dispatch.collecting_refusals() as refusals, fastattn.use_backend("cuda"):
        for arch in archs:
            with cuda.recording(arch, SMS.get(arch, SMS[90])) as recorded:
                for model, batch in models:
                    warmup_model.run(model, batch, backward=not arguments.inference)
                if not models:
                    _call_ops(arguments)
            launches += [(arch, launch) for launch in recorded.launches]
    return launches, list(dict.fromkeys(refusals))


def _distinct(launches: Sequence[tuple[int, cuda.Launch]]) -> list[Target]:
    """Each kernel that they need, once."""
    targets: dict[tuple[str, str, str], Target] = {}
    for arch, launch in launches:
        name = jit.target(launch.kernel, arch)
        targets.setdefault((launch.kernel.file, str(launch.kernel), name), Target(launch.kernel, name))
    return list(targets.values())


def _call_ops(arguments: argparse.Namespace) -> None:
    for op in arguments.op:
        sizes = arguments.hidden if op.endswith("norm") else arguments.headdim
        for dtype in arguments.dtype:
            for size in sizes:
                with torch.set_grad_enabled(not arguments.inference):
                    for outputs, inputs in CALLS[op](DTYPES[dtype], size, *arguments.heads):
                        if outputs[0].requires_grad:
                            torch.autograd.grad(outputs, inputs, [torch.empty_like(o) for o in outputs])


Calls = Iterator[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]  # outputs, inputs with a gradient


def _attention(dtype: torch.dtype, headdim: int, nheads: int, nheads_k: int) -> Calls:
    q, k, v = (_leaf(2, SEQLEN, n, headdim, dtype=dtype) for n in (nheads, nheads_k, nheads_k))
    yield [fastattn.attention(q, k, v, causal=True)], [q, k, v]
    yield [fastattn.attention(q, k, v)], [q, k, v]
    mask = torch.ones(2, 1, 1, SEQLEN, dtype=torch.bool)
    yield [fastattn.attention(q, k, v, mask=mask)], [q, k, v]
    q, k, v = (_leaf(2 * SEQLEN, n, headdim, dtype=dtype) for n in (nheads, nheads_k, nheads_k))
    starts = torch.tensor([0, SEQLEN, 2 * SEQLEN], dtype=torch.int32)
    packed = fastattn.attention(q, k, v, causal=True, cu_seqlens_q=starts, max_seqlen_q=SEQLEN, max_seqlen_k=SEQLEN)
    yield [packed], [q, k, v]


def _attention_kvcache(dtype: torch.dtype, headdim: int, nheads: int, nheads_k: int) -> Calls:
    for batch in (1, 16):
        q = torch.empty(batch, 1, nheads, headdim, dtype=dtype)
        new = torch.empty(batch, 1, nheads_k, headdim, dtype=dtype)
        lengths = torch.full((batch,), CACHED - 1, dtype=torch.int32)
        keys, values = (torch.empty(batch, CACHED, nheads_k, headdim, dtype=dtype) for _ in range(2))
        yield [fastattn.attention_kvcache(q, keys, values, lengths, k=new, v=new)], []
        pages = torch.arange(batch * CACHED // 256, dtype=torch.int32).view(batch, -1)
        keys, values = (torch.empty(pages.numel(), 256, nheads_k, headdim, dtype=dtype) for _ in range(2))
        yield [fastattn.attention_kvcache(q, keys, values, lengths, k=new, v=new, block_table=pages)], []


def _norm(function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> Callable[..., Calls]:
    def calls(dtype: torch.dtype, hidden: int, nheads: int, nheads_k: int) -> Calls:
        x, residual, weight = (
            _leaf(2 * SEQLEN, hidden, dtype=dtype),
            _leaf(2 * SEQLEN, hidden, dtype=dtype),
            _leaf(hidden, dtype=dtype),
        )
        for extra in ({}, {"residual": residual}):
            outputs = function(x, weight, **extra)
            yield outputs if isinstance(outputs, tuple) else [outputs], [x, weight]

    return calls


def _rope(dtype: torch.dtype, headdim: int, nheads: int, nheads_k: int) -> Calls:
    q, k = (_leaf(2, SEQLEN, n, headdim, dtype=dtype) for n in (nheads, nheads_k))
    cos, sin = (torch.empty(SEQLEN, headdim // 2) for _ in range(2))
    yield fastattn.rope_qk(q, k, cos, sin), [q, k]


def _leaf(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, requires_grad=True)


CALLS: dict[str, Callable[..., Calls]] = {
    "attention": _attention,
    "attention_kvcache": _attention_kvcache,
    "layer_norm": _norm(fastattn.layer_norm),
    "rms_norm": _norm(fastattn.rms_norm),
    "rope": _rope,
}


@dataclass(frozen=True)
class Outcome:
    """How one compilation went; seconds is None when the kernel was in the cache."""

    seconds: float | None = None
    failure: str | None = None

    def __str__(self) -> str:
        return self.failure or ("was there" if self.seconds is None else f"{self.seconds:.1f} s")


def _compiled(targets: Sequence[Target], jobs: int) -> Iterator[tuple[Target, Outcome]]:
    """NVRTC compiles one program at a time per process, so several processes."""
    missing = []
    for target in targets:
        if jit.is_cached(target.kernel, target.arch):
            yield target, Outcome()
        else:
            missing.append(target)
    if min(jobs, len(missing)) < 2:
        yield from ((target, _compile(target)) for target in missing)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context) as pool:
        yield from zip(missing, pool.map(_compile, missing), strict=True)


def _compile(target: Target) -> Outcome:
    start = time.perf_counter()
    try:
        jit.load(target.kernel, target.arch)
    except RuntimeError as failure:
        return Outcome(failure=str(failure))
    seconds = time.perf_counter() - start
    return Outcome(
        seconds, None if jit.is_cached(target.kernel, target.arch) else "compiled, but the cache did not keep it"
    )
