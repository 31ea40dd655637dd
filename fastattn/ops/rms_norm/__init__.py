"""Root-mean-square normalisation: the public function. README.md says which model rounds where."""

from __future__ import annotations

import torch

from fastattn.ops import _eager
from fastattn.ops._dispatch import forced_backend
from fastattn.ops._norm import check_tensors
from fastattn.ops.rms_norm.op import rms_norm_fwd


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "llama",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = x / sqrt(mean(x²) + eps) * (weight + weight_offset) over the last axis (Zhang & Sennrich, arXiv:1910.07467).

    x              [..., cols] float32, bfloat16, float16 or float64; any strides with a unit last stride
    weight         [cols] of x's dtype or float32; None is 1
    eps            at least 0, added to the mean square
    residual       like x; then x + residual, rounded to x's dtype, is what is normalised, and is returned too
    weight_offset  added to the weight in float32
    rounding       where the cast to x's dtype happens, because models differ:
                   "llama"  x_hat is cast, then multiplied (Llama, Mistral, Qwen, DeepSeek, T5)
                   "last"   multiplied in float32, then cast (OLMo, GPT-OSS, torch's F.rms_norm)
                   "gemma"  as "last" with 1 + weight; together with weight_offset it is an error

    Returns y, contiguous, of x's shape and dtype; with residual the pair (y, x + residual).
    Differentiable in x, weight and residual; the gradient of weight does not depend on the thread count.
    Raises ValueError when an argument is wrong, UnsupportedError when a forced backend does not take the call.

    >>> h, stream = fastattn.rms_norm(attention_out, norm.weight, eps=1e-5, residual=stream)
    """
    if _eager.plain(x, weight, residual):
        threads = torch.get_num_threads()
        y = _eager.door.norm_eager(x, weight, None, residual, False, eps, weight_offset, rounding, threads)
        if y is not None:
            return y
    check_tensors("rms_norm", x=x, weight=weight, residual=residual)
    y, total, _ = rms_norm_fwd(x, weight, residual, eps, weight_offset, rounding, forced_backend(None))
    return y if residual is None else (y, total)
