"""torch's operators of fused attention on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.ops import _eager
from fastattn.sdpa._calls import dense, differentiate, ours_fits, specify, taker

Tensor = torch.Tensor
_num_threads = torch.get_num_threads


def _forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu. A bool mask arrives as an additive one; causal is upper left."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    right = 0 if is_causal else None
    if attn_mask is None and not dropout_p and ours_fits(query) and _eager.unforced():
        found = _eager.door.attention_eager(q, k, v, None, right, is_causal, scale, _num_threads())
        if found is not None:
            return found[0].transpose(1, 2), found[1].transpose(1, 2).contiguous().transpose(1, 2)
    spec = specify(q, k, v, attn_mask, (None, right, is_causal), scale, dropout_p)
    backend = None if spec is None else taker("attention", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    out = torch.empty_like(query)
    lse = query.new_empty(spec.batch, spec.nheads, spec.seqlen_q, dtype=_statistics(query))
    backend.impl.forward(spec, q, k, v, out.transpose(1, 2), lse, None, attn_mask, None, None, None, None, None)
    if attn_mask is not None:  # of a row that sees no key torch stores 0, which torch's backward relies on
        lse.masked_fill_(lse == float("-inf"), 0)
    # The strides that torch's meta function promises to compiled code: [batch, seqlen_q, nheads] in memory.
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_for_backward; K and V of grouped heads come unrepeated."""
    q, k, v = dense(query, key, value)
    band = (None, 0 if is_causal else None, is_causal)
    spec = specify(q, k, v, attn_mask, band, scale, dropout_p)
    backend = None if spec is None else taker("attention_bwd", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    do, o = dense(grad_out, out)
    return dense(*differentiate(backend, spec, do, q, k, v, o, logsumexp, attn_mask, None, None, None))


def _statistics(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _backward,
}
