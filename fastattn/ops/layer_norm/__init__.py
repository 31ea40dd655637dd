"""Layer normalisation: the public function. README.md has the derivation of the backward pass."""

from __future__ import annotations

import torch

from fastattn.ops import _eager
from fastattn.ops._dispatch import forced_backend
from fastattn.ops._norm import check_tensors
from fastattn.ops.layer_norm.op import layer_norm_fwd


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (Ba et al., arXiv:1607.06450).

    x         [..., cols] float32, bfloat16, float16 or float64; any strides with a unit last stride
    weight    [cols] of x's dtype or float32; None is 1
    bias      [cols] of weight's dtype; None is 0
    eps       at least 0, added to the (biased) variance
    residual  like x; then x + residual, rounded to x's dtype, is what is normalised, and is returned too

    Statistics and arithmetic are float32 (float64 for float64), rounded to x's dtype once, at the end.
    Returns y, contiguous, of x's shape and dtype; with residual the pair (y, x + residual).
    Differentiable in x, weight, bias and residual; the gradients of weight and bias do not depend on the thread count.
    Raises ValueError when an argument is wrong, UnsupportedError when a forced backend does not take the call.

    >>> h, stream = fastattn.layer_norm(attention_out, norm.weight, norm.bias, residual=stream)
    """
    if _eager.plain(x, weight, bias, residual):
        y = _eager.door.norm_eager(x, weight, bias, residual, True, eps, 0.0, "last", torch.get_num_threads())
        if y is not None:
            return y
    check_tensors("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    y, total, _, _ = layer_norm_fwd(x, weight, bias, residual, eps, forced_backend(None))
    return y if residual is None else (y, total)
