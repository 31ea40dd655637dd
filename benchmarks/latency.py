"""Host cost: one token (1 x 4096) through each public function, where checks and allocation outweigh the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.ops.attention import reference as attention_reference
from fastattn.ops.layer_norm.reference import layer_norm as layer_norm_reference
from fastattn.ops.rms_norm.reference import rms_norm as rms_norm_reference
from fastattn.ops.rope.reference import rope as rope_reference

from .case import OURS, Case, Contender, Prepared, Problem
from .rivals import rotate_half_rope
from .rope import tables

Tensor = torch.Tensor


def cases(quick: bool = False) -> list[Case]:
    builders: dict[str, Callable[[], Problem]] = {
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
        "rope": _rope,
        "attention": partial(_attention, False),
        "attention with grad": partial(_attention, True),
    }
    return [Case("latency", "one token", name, "fp32", "latency", 0, build) for name, build in builders.items()]


def _problem(
    reference: Callable[..., Any], arguments: tuple[Tensor, ...], ways: dict[str, Callable[[], Any]]
) -> Problem:
    def law(dtype: torch.dtype) -> dict[str, Tensor]:
        return {"y": reference(*(t.to(dtype) for t in arguments)).detach()}

    def contender(name: str, call: Callable[[], Any]) -> Contender:
        return Contender(name, lambda: Prepared(call, lambda y: {"y": y.detach()}))

    contenders = [contender(name, call) for name, call in ways.items()]
    return Problem(law(torch.float64), law(torch.float32), contenders)


def _vectors(*sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=g) for size in sizes)


def _rms_norm() -> Problem:
    x, weight = _vectors((1, 4096), (4096,))
    ways = {OURS: lambda: fastattn.rms_norm(x, weight), "F.rms_norm": lambda: F.rms_norm(x, (4096,), weight, 1e-6)}
    return _problem(rms_norm_reference, (x, weight), ways)


def _layer_norm() -> Problem:
    x, weight, bias = _vectors((1, 4096), (4096,), (4096,))
    ways = {
        OURS: lambda: fastattn.layer_norm(x, weight, bias),
        "F.layer_norm": lambda: F.layer_norm(x, (4096,), weight, bias, 1e-5),
    }
    return _problem(layer_norm_reference, (x, weight, bias), ways)


def _rope() -> Problem:
    (x,) = _vectors((1, 1, 32, 128))
    cos, sin = (t[1:] for t in tables(2, 128))
    full = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    ways = {
        OURS: lambda: fastattn.rope(x, cos, sin),
        "rotate-half": lambda: rotate_half_rope(x, x[..., :0, :], *full)[0],
    }
    return _problem(rope_reference, (x, cos, sin), ways)


def _attention(grad: bool) -> Problem:
    q, k, v = (t.requires_grad_(grad) for t in _vectors((1, 2, 2, 16), (1, 2, 2, 16), (1, 2, 2, 16)))
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
    ways = {
        OURS: lambda: fastattn.attention(q, k, v),
        "SDPA": lambda: F.scaled_dot_product_attention(q_, k_, v_).transpose(1, 2),
    }
    return _problem(attention_reference.attention, (q, k, v), ways)
