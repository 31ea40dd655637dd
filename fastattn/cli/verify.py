"""Hold every operation, or a model, to float64 on this machine: its error as a ratio to plain PyTorch's and to SDPA's.

A ratio below 1 is more accurate than plain PyTorch in the same dtype; the law allows 2. Outputs and gradients count.
Exit code 0: the law holds, 1: it is broken or a call fails somewhere, 2: bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import fastattn
from fastattn.benchmarks.case import DTYPES
from fastattn.benchmarks.law import judge
from fastattn.cli.scenarios import OPS, Placed, Scenario, cast

Tensor = torch.Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", nargs="+", action="extend", choices=tuple(OPS), metavar="OP", help="only these of %(choices)s"
    )
    parser.add_argument(
        "--dtype", nargs="+", action="extend", choices=tuple(DTYPES), metavar="DTYPE", help="only these of %(choices)s"
    )
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu", "reference"), help="force this backend")
    parser.add_argument("--device", default="cpu", help="where the operations run, such as cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of the table")
    parser.add_argument(
        "--model",
        help="instead of the operations: a folder of a transformers model, or module:function that returns a model (or "
        "a model and its batch), compared layer by layer with eager",
    )
    parser.add_argument("--batch", help="with --model: a .json or torch.save file with the model's keyword arguments")


@dataclass(frozen=True)
class Finding:
    """One operation, option and dtype. `tensor` is the worst of its outputs and gradients; to_sdpa compares o alone."""

    op: str
    option: str
    dtype: str
    status: str  # "ok" · "BROKEN" · "FAILED" · "unsupported"
    tensor: str = ""
    error: float | None = None
    to_plain: float | None = None
    rms_to_plain: float | None = None
    to_sdpa: float | None = None
    reason: str = ""


def run(arguments: argparse.Namespace) -> int:
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as failure:
        print(f"verify: --device must be one that torch can use, got {arguments.device!r}: {failure}", file=sys.stderr)
        return 2
    if error := _misplaced(arguments):
        print(f"verify: {error}", file=sys.stderr)
        return 2
    if arguments.model is not None:
        from fastattn.cli import verify_model

        return verify_model.run(arguments)
    found = []
    if not arguments.json:
        print(_HEAD)
    for op in arguments.op or OPS:
        for scenario in OPS[op]():
            for dtype in arguments.dtype or DTYPES:
                finding = examine(scenario, dtype, arguments.backend, arguments.device)
                print(json.dumps(asdict(finding)) if arguments.json else _line(finding), flush=True)
                found.append(finding)
    broken, failed = ([f for f in found if f.status == status] for status in ("BROKEN", "FAILED"))
    measured = [f for f in found if f.status == "ok" and f.to_plain is not None]
    if not arguments.json:
        worst = max((f.to_plain or 0.0 for f in measured), default=0.0)
        counts = f"{len(broken)} broken" + (f", {len(failed)} failed" if failed else "")
        print(f"\n{len(measured)} lawful, worst ratio to plain PyTorch {worst:.2f}; {counts}")
    return 1 if broken or failed or not measured else 0


def _misplaced(arguments: argparse.Namespace) -> str:
    """What was asked for together and cannot be; an option that would do nothing is an error."""
    if arguments.model is None:
        return "--batch must come with --model, got none" if arguments.batch is not None else ""
    given = {"--op": arguments.op, "--backend": arguments.backend, "--device": arguments.device != "cpu"}
    if extra := [name for name, value in given.items() if value]:
        return f"{extra[0]} must be left out with --model, whose own device and operations count"
    return "--dtype must be given once with --model" if len(arguments.dtype or ()) > 1 else ""


def examine(scenario: Scenario, dtype_name: str, backend: str | None = None, device: str = "cpu") -> Finding:
    """Outputs and gradients of fastattn, of plain PyTorch in the dtype, and of float64, compared.

    A refusal is "unsupported"; what else stops a computation (a kernel's launch, no memory left) is "FAILED".
    """
    try:
        return _compared(scenario, dtype_name, backend, device)
    except fastattn.UnsupportedError as refusal:
        status, reason = "unsupported", str(refusal)
    except (RuntimeError, MemoryError) as failure:
        status, reason = "FAILED", f"{type(failure).__name__}: {failure}"
    return Finding(scenario.op, scenario.option, dtype_name, status, reason=" ".join(reason.split()))


def _compared(scenario: Scenario, dtype_name: str, backend: str | None, device: str) -> Finding:
    dtype = DTYPES[dtype_name]
    ops, reference = (m if device == "cpu" else Placed(m, device) for m in (fastattn, fastattn.reference))
    plain = results(scenario, dtype, partial(scenario.call, reference))
    truth = results(scenario, dtype, partial(scenario.call, reference), wide=True)
    with fastattn.use_backend(backend):
        ours = results(scenario, dtype, partial(scenario.call, ops))
    verdict = judge(ours, plain, truth)
    to_sdpa = None
    if scenario.sdpa is not None and device == "cpu":
        with torch.no_grad():
            rival = scenario.sdpa(cast(scenario, dtype))["o"].double()
        rival_error = float((rival - truth["o"]).abs().max())
        to_sdpa = float((ours["o"].double() - truth["o"]).abs().max()) / rival_error if rival_error else None
    return Finding(
        scenario.op,
        scenario.option,
        dtype_name,
        "ok" if verdict.lawful else "BROKEN",
        verdict.tensor,
        verdict.error,
        to_plain=verdict.ratio,
        rms_to_plain=verdict.rms_ratio,
        to_sdpa=to_sdpa,
        reason=verdict.reason,
    )


def results(
    scenario: Scenario,
    dtype: torch.dtype,
    call: Callable[[dict[str, Tensor]], dict[str, Any]],
    wide: bool = False,
) -> dict[str, Tensor]:
    """Named outputs and, for the leaves, gradients `d<name>` of all differentiable outputs under fixed cotangents.

    Inputs and cotangents are rounded to the dtype under test; `wide` then computes with the same numbers in float64.
    """
    tensors = cast(scenario, dtype, wide)
    outputs = call(tensors)
    found = {name: out.detach() for name, out in outputs.items()}
    if not scenario.leaves:
        return found
    g = torch.Generator().manual_seed(99)
    cotangents = {name: torch.randn(out.shape, generator=g) for name, out in outputs.items()}
    chosen = [name for name, out in outputs.items() if out.requires_grad]
    given = [cotangents[n].to(torch.float32 if n == "lse" else dtype).to(outputs[n].dtype) for n in chosen]
    leaves = [tensors[name] for name in scenario.leaves]
    gradients = torch.autograd.grad([outputs[n] for n in chosen], leaves, given)
    return found | {f"d{name}": gradient for name, gradient in zip(scenario.leaves, gradients, strict=True)}


_WIDTHS = (18, 18, 5, 12, 10, 9, 9, 8)
_HEAD = "  ".join(
    text.ljust(width)
    for text, width in zip(
        ("op", "option", "dtype", "worst of", "error", "to plain", "rms", "to SDPA"), _WIDTHS, strict=True
    )
)


def _line(f: Finding) -> str:
    if f.error is None:
        return f"{f.op:<18}  {f.option:<18}  {f.dtype:<5}  {f.status}: {f.reason}"
    cells = (f.op, f.option, f.dtype, f.tensor, f"{f.error:.2e}", f"{f.to_plain:.2f}", f"{f.rms_to_plain:.2f}")
    sdpa = "" if f.to_sdpa is None else f"{f.to_sdpa:.2f}"
    line = "  ".join(cell.ljust(width) for cell, width in zip((*cells, sdpa), _WIDTHS, strict=True)).rstrip()
    return f"{line}  BROKEN: {f.reason}" if f.status == "BROKEN" else line
