"""What a layer_norm call must look like. The op and its fake both run `check`."""

from __future__ import annotations

import torch

from fastattn.ops._norm import NormSpec, check


def check_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> NormSpec:
    """Raises ValueError in the user's words, or returns the specification."""
    return check("layer_norm", x, weight, bias, residual, eps)
