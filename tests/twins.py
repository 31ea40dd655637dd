"""A module of ours beside torch's, with the same parameters: outputs and all gradients under the law."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import law
import torch

Tensor = torch.Tensor


def check(ours: torch.nn.Module, torchs: torch.nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Hold ours(*args, **kwargs) to the law: torchs is plain PyTorch, torchs in float64 the truth. Returns ours' outputs.

    Gradients are taken of every parameter, and of every argument that wants one; a small one is a sum of terms that
    cancel, as large as the largest gradient there is. Dropout must be off.
    """
    ours.load_state_dict(torchs.state_dict())
    got, plain = run(ours, args, kwargs), run(torchs, args, kwargs)
    truth = run(copy.deepcopy(torchs).double(), *double((args, kwargs)))
    assert got.keys() == plain.keys() == truth.keys()
    dtype = next((t.dtype for t in torchs.parameters()), torch.float32)
    size = {name: float(t.abs().amax()) if t.numel() else 0.0 for name, t in truth.items()}
    largest = max((s for name, s in size.items() if name.startswith("d ")), default=0.0)
    for name in got:
        terms = largest if name.startswith("d ") else size[name]
        law.compare(name, got[name], plain[name], truth[name], dtype, terms)
    return [t for name, t in got.items() if name.startswith("output")]


def run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """output0, ..., and the gradient of each parameter and argument by name. Cotangents depend on the shapes alone."""
    found = module(*args, **kwargs)
    outputs = [o for o in (found if isinstance(found, tuple) else (found,)) if o is not None]
    named = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    leaves = {f"d {name}": p for name, p in module.named_parameters()}
    arguments = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    leaves |= {f"d {k}": a for k, a in arguments.items() if isinstance(a, Tensor) and a.requires_grad}
    outputs = [o for o in outputs if o.requires_grad]
    if not outputs or not leaves:
        return named
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return named | {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def double(x: Any) -> Any:
    """Every floating tensor in float64, leaves again."""
    if isinstance(x, Tensor):
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
    if isinstance(x, dict):
        return {k: double(v) for k, v in x.items()}
    return tuple(double(v) for v in x) if isinstance(x, tuple) else x


def without_dropout(module: torch.nn.Module) -> torch.nn.Module:
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        if isinstance(m, torch.nn.MultiheadAttention):
            m.dropout = 0.0
    return module
