"""torch's other operators of fused attention on CUDA: cuDNN's, which torch prefers on Hopper, and the memory-efficient one.

Both take what flash attention does not: a bias (a boolean mask arrives as one), and the memory-efficient one float32,
headdims that differ and a bias that wants a gradient. Causal is aligned upper left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn.ops._dispatch import Backend
from fastattn.ops.attention.spec import AttentionSpec
from fastattn.sdpa._calls import attend, dense, differentiate, laid_like, specify, taker

Tensor = torch.Tensor


def _served(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
) -> tuple[Backend, AttentionSpec] | None:
    """None when torch's own kernel serves."""
    q, k, v = dense(query, key, value)
    spec = specify(q, k, v, bias, (None, 0 if is_causal else None, is_causal), scale, dropout_p)
    backend = None if spec is None else taker(op, spec)
    return None if spec is None or backend is None else (backend, spec)


def _unexpanded(bias: Tensor | None) -> Tensor | None:
    """torch expands a bias to [batch, nheads, seqlen_q, seqlen_k]; what repeats is read once."""
    if bias is None:
        return None
    for dim, stride in enumerate(bias.stride()):
        if stride == 0:
            bias = bias.narrow(dim, 0, 1)
    return bias


def _apart(philox: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seed and offset, undefined when nothing drops. Compiled code wants each at a multiple of 16 bytes."""
    if philox is None:
        seed, offset = (torch.empty((), dtype=torch.int64, device=device) for _ in range(2))
        return seed, offset
    return philox[0], philox[1].clone()


def _philox(seed: Tensor, offset: Tensor, dropout_p: float) -> Tensor | None:
    return torch.stack((seed, offset)) if dropout_p > 0 else None


def _efficient_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_efficient_attention. Rows of logsumexp are padded to multiples of 32, with +inf."""
    bias = _unexpanded(attn_bias)
    served = _served("attention", query, key, value, bias, is_causal, scale, dropout_p)
    if served is None:
        return torchs.call_boxed(
            keys, query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale=scale
        )
    backend, spec = served
    q, k, v = dense(query, key, value)
    out = q.new_empty(spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v)
    lse, philox = attend(backend, spec, q, k, v, out, bias)
    if not compute_log_sumexp:
        lse = lse.new_empty(spec.batch, spec.nheads, 0)
    elif spec.seqlen_q % 32:
        lse = torch.nn.functional.pad(lse, (0, -spec.seqlen_q % 32), value=math.inf)
    return out.transpose(1, 2), lse, *_apart(philox, query.device)


def _efficient_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: Sequence[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_efficient_attention_backward."""
    wants_dbias = attn_bias is not None and grad_input_mask[3]
    bias = attn_bias if wants_dbias else _unexpanded(attn_bias)
    served = _served("attention_bwd", query, key, value, bias, is_causal, scale, dropout_p)
    if served is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
            grad_input_mask, is_causal, scale=scale,
        )  # fmt: skip
    backend, spec = served
    q, k, v, do, o = dense(query, key, value, grad_out, out)
    lse, philox = logsumexp[..., : spec.seqlen_q], _philox(philox_seed, philox_offset, dropout_p)
    if lse.shape[-1] < spec.seqlen_q:  # torch asks for none when only the bias wants a gradient
        lse, _ = attend(backend, spec._replace(dropout_p=0.0), q, k, v, torch.empty_like(o), bias)
    dbias = None
    if wants_dbias:
        dbias = torch.zeros(bias.shape, dtype=torch.float32, device=query.device)  # type: ignore[union-attr]
    found = differentiate(backend, spec, do, q, k, v, o, lse, bias, None, None, philox, dbias)
    return *dense(*found), None if dbias is None else _padded(dbias, query.dtype)


def _padded(dbias: Tensor, dtype: torch.dtype) -> Tensor:
    """In memory whose rows are multiples of 16 elements, as torch's kernel returns it."""
    *rows, cols = dbias.shape
    memory = torch.empty(*rows, cols + -cols % 16, dtype=dtype, device=dbias.device)
    return memory[..., :cols].copy_(dbias)


def _cudnn_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_cudnn_attention. logsumexp: [batch, nheads, seqlen_q, 1]."""
    bias = _unexpanded(attn_bias)
    served = _served("attention", query, key, value, bias, is_causal, scale, dropout_p)
    if served is None or return_debug_mask:
        return torchs.call_boxed(
            keys, query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale=scale
        )
    backend, spec = served
    q, k, v = dense(query, key, value)
    out = _output_like(query, spec.headdim_v)
    lse, philox = attend(backend, spec, q, k, v, out.transpose(1, 2), bias)
    return out, lse.unsqueeze(-1), None, None, spec.seqlen_q, spec.seqlen_k, *_apart(philox, query.device), None


def _output_like(query: Tensor, headdim_v: int) -> Tensor:
    """[batch, nheads, seqlen_q, headdim_v] with dimensions in the order of query's in memory."""
    if query.shape[-1] == headdim_v:
        return torch.empty_like(query)
    order = sorted(range(4), key=query.stride, reverse=True)
    return torch.empty_permuted((*query.shape[:3], headdim_v), order, dtype=query.dtype, device=query.device)


def _cudnn_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_cudnn_attention_backward. The gradients have their inputs' strides."""
    bias = _unexpanded(attn_bias)
    served = _served("attention_bwd", query, key, value, bias, is_causal, scale, dropout_p)
    if served is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
            cum_seq_k, max_q, max_k, dropout_p, is_causal, scale=scale,
        )  # fmt: skip
    backend, spec = served
    q, k, v, do, o = dense(query, key, value, grad_out, out)
    philox = _philox(philox_seed, philox_offset, dropout_p)
    found = differentiate(backend, spec, do, q, k, v, o, logsumexp.squeeze(-1), bias, None, None, philox)
    return tuple(laid_like(t, gradient) for t, gradient in zip((query, key, value), found, strict=True))


KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_efficient_attention": _efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
