"""Say what runs here: versions, instruction set, threads, huge pages, and which backend serves each operation.

Exit code 0 if the native module works, 1 if it does not (everything then runs on the slow references).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch

import fastattn
from fastattn.cli import matrix
from fastattn.runtime import cache, cuda, env, jit, launch, native, nvrtc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--matrix", action="store_true", help="the support matrix as Markdown (docs/support-matrix.md)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.matrix:
        print(matrix.markdown(), end="")
        return 0
    facts = dict(collect())
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    if error := native.error():
        print(f"\ndoctor: {error}", file=sys.stderr)
        return 1
    return 0


def _print(facts: dict[str, Any]) -> None:
    """A line per fact; operations whose backends are in the same state share theirs."""
    operations: dict[str, list[str]] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            states = "\n".join(f"  {backend:<12}{state}" for backend, state in value.items())
            operations.setdefault(states, []).append(name)
        else:
            print(f"{name:<14}{value}")
    for states, names in operations.items():
        print(f"backends of {', '.join(names)}:\n{states}")


def collect() -> Iterator[tuple[str, Any]]:
    from fastattn.benchmarks.machine import cpu_model, transparent_huge_pages, version_of

    yield "fastattn", f"{fastattn.__version__} in {os.path.dirname(fastattn.__file__)}"
    yield "torch", torch.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("triton", "transformers", "onnxruntime"):
        yield package, version_of(package) or "not installed"
    yield "cpu", f"{cpu_model()}, {os.cpu_count()} cores"
    yield "gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads; the pool is torch's own)"
    if native.error() is None:
        module = native.module()
        forced = " (FASTATTN_CPU_ISA)" if env.CPU_ISA else ""
        yield "native", f"{getattr(module, '__file__', 'built in')}{_compiler(module)}"
        yield "isa", f"{module.isa()}{forced} of {', '.join(module.isas())}"
        ours = "on" if env.HUGEPAGES else "off (FASTATTN_HUGEPAGES=0)"
    else:
        yield "native", f"absent: {native.error()}"
        ours = "absent with the native module"
    yield "huge pages", f"kernel: {transparent_huge_pages()}; fastattn's large outputs: {ours}"
    yield "nvrtc", jit.error() or str(nvrtc.library())
    yield "kernel cache", str(cache.location() or "off: every process compiles its CUDA kernels anew")
    yield "forced", env.BACKEND or "no backend (FASTATTN_BACKEND)"
    for op, backends in matrix.rooms():
        yield op, {backend.name: _state(backend) for backend in backends}


def _compiler(module: Any) -> str:
    compiler = getattr(module, "compiler", None)
    return f", compiler {compiler() if callable(compiler) else compiler}" if compiler else ""


def _state(backend: Any) -> str:
    """Whether the backend can run on this machine; what it refuses in a given call is `fastattn.explain`'s to say."""
    if backend.name == "cpu" and native.error() is not None:
        return f"missing, {native.error()}"
    here = "cuda" if torch.cuda.is_available() else "cpu"
    asked = {"cuda": cuda.objections, "triton": launch.objections}.get(backend.name)
    if asked is not None and (wants := asked(here)):
        return f"cannot run here, wants {'; '.join(wants)}"
    try:
        importlib.import_module(backend.module)
    except (ImportError, RuntimeError) as failure:
        return f"missing, {failure}"
    return "ready"
