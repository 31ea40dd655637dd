"""rms_norm on the CUDA C++ kernels (fastattn/ops/_norm_cuda.py)."""

from __future__ import annotations

from fastattn.ops import _norm_cuda
from fastattn.ops.rms_norm.spec import offset_of


def forward(x, weight, residual, eps, weight_offset, rounding):
    """y, x + residual (None without residual), rstd."""
    offset = offset_of(weight_offset, rounding)
    y, total, _, rstd = _norm_cuda.forward(
        x, weight, None, residual, eps, centred=False, weight_offset=offset, round_first=rounding == "llama"
    )
    return y, total, rstd


def backward(dy, dsum, x, weight, rstd, eps, weight_offset, rounding, wants_dweight):
    """dx, dweight. Roundings have the gradient of the identity."""
    dx, dweight, _ = _norm_cuda.backward(
        *(dy, dsum, x, weight, None, rstd),
        dweight_dtype=weight.dtype if wants_dweight else None,
        dbias_dtype=None,
        weight_offset=offset_of(weight_offset, rounding),
    )
    return dx, dweight
