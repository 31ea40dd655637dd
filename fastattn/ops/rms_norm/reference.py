"""rms_norm in plain PyTorch: any dtype, any device, differentiable. The law that the kernels are held to."""

from __future__ import annotations

import torch

from fastattn.ops.rms_norm.spec import offset_of


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "llama",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = x / sqrt(mean(x²) + eps) * (weight + weight_offset), in float32 (float64 for float64)."""
    total = x if residual is None else x + residual
    y = _normalise(total, weight, eps, weight_offset, rounding)[0]
    return y if residual is None else (y, total)


def _normalise(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float, rounding: str
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if rounding == "llama":
        y = y.to(x.dtype)
    if weight is not None:
        offset = offset_of(weight_offset, rounding)
        y = y * (weight if offset == 0 else weight.to(wide.dtype) + offset)
    return y.to(x.dtype), rstd


def forward(x, weight, residual, eps, weight_offset, rounding):
    """y, x + residual (None without residual), rstd."""
    total = None if residual is None else x + residual
    y, rstd = _normalise(x if total is None else total, weight, eps, weight_offset, rounding)
    return y.contiguous(), None if total is None else total.contiguous(), rstd.squeeze(-1).float()


def backward(dy, dsum, x, weight, rstd, eps, weight_offset, rounding, wants_dweight):
    """dx, dweight by autograd through the formula; the saved float32 statistics would cost float64 its accuracy."""
    x, weight = (None if t is None else t.detach().requires_grad_() for t in (x, weight))
    with torch.enable_grad():
        y = _normalise(x, weight, eps, weight_offset, rounding)[0]
    dx, *dweight = torch.autograd.grad(y, [x, weight] if wants_dweight else [x], dy)
    dx = dx if dsum is None else dx + dsum
    return dx.contiguous(), dweight[0] if wants_dweight else None
