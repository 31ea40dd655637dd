"""layer_norm on the CUDA C++ kernels (fastattn/ops/_norm_cuda.py)."""

from __future__ import annotations

from fastattn.ops import _norm_cuda


def forward(x, weight, bias, residual, eps):
    """y, x + residual (None without residual), mean, rstd."""
    return _norm_cuda.forward(x, weight, bias, residual, eps, centred=True)


def backward(dy, dsum, x, weight, bias, mean, rstd, eps, wants_dweight, wants_dbias):
    """dx, dweight, dbias."""
    return _norm_cuda.backward(
        *(dy, dsum, x, weight, mean, rstd),
        dweight_dtype=weight.dtype if wants_dweight else None,
        dbias_dtype=bias.dtype if wants_dbias else None,
    )
