"""What an rms_norm call must look like. The op and its fake both run `check_rms_norm`."""

from __future__ import annotations

import torch

from fastattn.ops import _check
from fastattn.ops._norm import NormSpec, check

ROUNDINGS = ("llama", "last", "gemma")


def check_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    rounding: str,
) -> NormSpec:
    """Raises ValueError in the user's words, or returns the specification."""
    spec = check("rms_norm", x, weight, None, residual, eps)
    if rounding not in ROUNDINGS:
        _check.fail("rms_norm", "rounding", f"one of {', '.join(map(repr, ROUNDINGS))}", repr(rounding))
    _check.number("rms_norm", "weight_offset", weight_offset)
    if weight_offset != 0 and rounding == "gemma":
        _check.fail("rms_norm", "weight_offset", "0 with rounding='gemma', which already adds 1", weight_offset)
    if weight_offset != 0 and weight is None:
        _check.fail("rms_norm", "weight_offset", "0 without weight", weight_offset)
    return spec


def offset_of(weight_offset: float, rounding: str) -> float:
    """What is added to the weight."""
    return 1.0 if rounding == "gemma" else float(weight_offset)
