"""layer_norm in plain PyTorch: any dtype, any device, differentiable. The law that the kernels are held to."""

from __future__ import annotations

import torch


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in float32 (float64 for float64), rounded at the end."""
    total = x if residual is None else x + residual
    y = _normalise(total, weight, bias, eps)[0]
    return y if residual is None else (y, total)


def _normalise(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def forward(x, weight, bias, residual, eps):
    """y, x + residual (None without residual), mean, rstd."""
    total = None if residual is None else x + residual
    y, mean, rstd = _normalise(x if total is None else total, weight, bias, eps)
    return y.contiguous(), _contiguous(total), mean.squeeze(-1).float(), rstd.squeeze(-1).float()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def backward(dy, dsum, x, weight, bias, mean, rstd, eps, wants_dweight, wants_dbias):
    """dx, dweight, dbias by autograd through the formula; the saved float32 statistics would cost float64 digits."""
    x, weight, bias = (None if t is None else t.detach().requires_grad_() for t in (x, weight, bias))
    with torch.enable_grad():
        y = _normalise(x, weight, bias, eps)[0]
    wanted = (x, weight if wants_dweight else None, bias if wants_dbias else None)
    grads = iter(torch.autograd.grad(y, [t for t in wanted if t is not None], dy))
    dx = next(grads)
    dweight, dbias = (next(grads) if wants else None for wants in (wants_dweight, wants_dbias))
    return (dx if dsum is None else dx + dsum).contiguous(), dweight, dbias
