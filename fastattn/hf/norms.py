"""Which formula a norm module computes, found by running it, and the forward that takes its place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastattn

Tensor = torch.Tensor
ROUNDINGS = ("llama", "last", "gemma")
_NUMBERS = 4096  # compared per rounding; the formulas differ in a quarter of them or more
_FEW = 0.01  # of the numbers may differ in their last bit, because 1 / sqrt and rsqrt may


def replacement(module: nn.Module) -> tuple[Callable[..., Any] | None, str] | None:
    """(forward, what it is) for a norm, (None, why not) for one that cannot be replaced, None for no norm at all."""
    if isinstance(module, nn.LayerNorm):
        if type(module).forward is not nn.LayerNorm.forward:
            return None, "a subclass of nn.LayerNorm with a forward of its own"
        if len(module.normalized_shape) != 1:
            return None, f"normalises {len(module.normalized_shape)} axes, fastattn.layer_norm the last one"
        return functools.partial(layer_norm_forward, module), "fastattn.layer_norm"
    if "norm" not in type(module).__name__.lower():
        return None
    eps = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    if any(True for _ in module.children()):
        return None if eps is None else (None, "has modules inside")
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if set(parameters) - {"weight"} or (weight is not None and weight.dim() != 1):
        return None, "has parameters besides one weight per column"
    arguments = [p for p in list(inspect.signature(type(module).forward).parameters.values())[1:]]
    if len(arguments) != 1 or arguments[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None, f"its forward takes {len(arguments)} arguments, a norm takes one"
    if not isinstance(eps, float):
        return None, f"eps must be a float to be compared, got {eps!r}"
    rounding = recognise(module, weight, eps)
    if rounding is None:
        return None, "its results fit none of the formulas " + ", ".join(ROUNDINGS)
    forward = functools.partial(rms_norm_forward, module, eps=eps, rounding=rounding, weighted=weight is not None)
    return forward, f'fastattn.rms_norm, rounding="{rounding}"'


def recognise(module: nn.Module, weight: Tensor | None, eps: float) -> str | None:
    """The `rounding` of `fastattn.rms_norm` that gives this module's numbers in float32 and in bfloat16."""
    columns = getattr(module, "normalized_shape", (64,))[-1] if weight is None else weight.shape[0]
    device = torch.device("cpu") if weight is None or weight.is_meta else weight.device
    rows = -(-_NUMBERS // columns)
    g = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.linspace(-2, 2, rows)[:, None]  # small rows show eps
    x = (torch.randn(rows, columns, generator=g) + 0.3) * sizes
    w = torch.randn(columns, generator=g)

    def differing(rounding: str, dtype: torch.dtype) -> float:
        """The share of numbers that differ (beyond the last bits, in float32) from the module's own."""
        a, b = x.to(device, dtype), None if weight is None else w.to(device, dtype)
        own = _run(module, a, b)
        if own is None or own.dtype != dtype or own.shape != a.shape:
            return 1.0
        ours: Any = fastattn.reference.rms_norm(a, b, eps=eps, rounding=rounding)
        close = torch.isclose(own, ours, rtol=1e-5, atol=1e-6) if dtype == torch.float32 else own == ours
        return 1.0 - float(close.double().mean())

    candidates = ROUNDINGS if weight is not None else ("last",)
    fits = [r for r in candidates if differing(r, torch.float32) == 0 and differing(r, torch.bfloat16) <= _FEW]
    return fits[0] if len(fits) == 1 else None


@torch.no_grad()
def _run(module: nn.Module, x: Tensor, weight: Tensor | None) -> Tensor | None:
    """The class's forward with these numbers as weight; None when it does not take them."""
    original = module._parameters.get("weight")
    if weight is not None:
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        return type(module).forward(module, x)
    except Exception:  # whatever the model's own code may raise
        return None
    finally:
        if weight is not None:
            module._parameters["weight"] = original


def layer_norm_forward(module: nn.LayerNorm, input: Tensor) -> Tensor:
    """nn.LayerNorm's forward; a weight of another dtype than the input's runs torch's own."""
    weight = module.weight
    if weight is not None and weight.dtype != input.dtype:
        return nn.LayerNorm.forward(module, input)
    x = input if input.stride(-1) == 1 else input.contiguous()
    y: Any = fastattn.layer_norm(x, weight, module.bias, eps=module.eps)
    return y


def rms_norm_forward(
    module: nn.Module, hidden_states: Tensor, *, eps: float, rounding: str, weighted: bool = True
) -> Tensor:
    """The norm on `fastattn.rms_norm`; with mixed dtypes, where models differ in what they return, the model's own.

    weighted  False: an attribute `weight` of the module, which is no parameter, takes no part (FalconMamba)
    """
    weight: Tensor | None = module.weight if weighted else None  # type: ignore[assignment]
    if weight is not None and weight.dtype != hidden_states.dtype:
        return type(module).forward(module, hidden_states)
    x = hidden_states if hidden_states.stride(-1) == 1 else hidden_states.contiguous()
    y: Any = fastattn.rms_norm(x, weight, eps=eps, rounding=rounding)
    return y
