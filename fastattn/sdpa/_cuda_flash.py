"""torch's operators of flash attention on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.sdpa._calls import attend, dense, differentiate, laid_like, specify, taker

Tensor = torch.Tensor


def _band(is_causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None, bool]:
    """Of torch's flash operators on CUDA: aligned bottom right, and -1 is unbounded."""
    sides = [None if side is None or side < 0 else side for side in (left, right)]
    return sides[0], 0 if is_causal else sides[1], False


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    packed: tuple[Any, ...],
    dropout_p: float,
    band: tuple[int | None, int | None, bool],
    scale: float | None,
) -> tuple[Tensor, ...] | None:
    """out, lse and what torch's flash operators return besides; None when torch's own kernel serves. Our layout."""
    spec = specify(q, k, v, None, band, scale, dropout_p, packed)
    backend = None if spec is None else taker("attention", spec)
    if spec is None or backend is None:
        return None
    out = torch.empty_like(q) if out is None else out
    cu_q, cu_k = packed[0], packed[0] if packed[1] is None else packed[1]
    lse, philox = attend(backend, spec, q, k, v, out, None, cu_q, cu_k)
    # The pair (seed, offset) is in rng_state. The offset's own place stays undefined, and all of it when nothing drops.
    rng_state = q.new_empty(2, dtype=torch.uint64) if philox is None else philox.view(torch.uint64)
    return out, lse, rng_state, q.new_empty((), dtype=torch.uint64), q.new_empty(0)


def _packed(cum_seq_q: Any, cum_seq_k: Any, max_q: Any, max_k: Any) -> tuple[Any, ...]:
    return (None,) * 4 if cum_seq_q is None else (cum_seq_q, cum_seq_k, max_q, max_k)


def _flash_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> Any:
    """aten::_flash_attention_forward. others: seqused_k, alibi_slopes, block_table, num_splits, for torch's kernel."""
    found = None
    if not return_debug_mask and all(option is None for option in others.values()):
        band = _band(is_causal, window_size_left, window_size_right)
        packed = _packed(cum_seq_q, cum_seq_k, max_q, max_k)
        found = _attend(query, key, value, None, packed, dropout_p, band, scale)
    if found is not None:
        return found
    return torchs.call_boxed(
        keys, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
        scale=scale, window_size_left=window_size_left, window_size_right=window_size_right, **others,
    )  # fmt: skip


def _flash_inplace(
    torchs: Any,
    keys: Any,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> Any:
    """aten::_flash_attention_forward_no_dropout_inplace: writes into out, returns lse."""
    found = None
    if not return_debug_mask and not dropout_p and all(option is None for option in others.values()):
        band = _band(is_causal, window_size_left, window_size_right)
        packed = _packed(cum_seq_q, cum_seq_k, max_q, max_k)
        found = _attend(query, key, value, out, packed, 0.0, band, scale)
    if found is not None:
        return found[1]
    return torchs.call_boxed(
        keys, out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
        scale=scale, window_size_left=window_size_left, window_size_right=window_size_right, **others,
    )  # fmt: skip


def _flash_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Any:
    """aten::_flash_attention_backward."""
    band = _band(is_causal, window_size_left, window_size_right)
    # Outside packed calls torch passes empty tensors or None.
    packed = _packed(cum_seq_q if cum_seq_q is not None and query.dim() == 3 else None, cum_seq_k, max_q, max_k)
    spec = specify(query, key, value, None, band, scale, dropout_p, packed)
    backend = None if spec is None else taker("attention_bwd", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
            rng_state, unused, scale=scale, window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
    philox = rng_state.view(torch.int64) if dropout_p > 0 else None
    cu_k = packed[0] if packed[1] is None else packed[1]
    return differentiate(backend, spec, grad_out, query, key, value, out, logsumexp, None, packed[0], cu_k, philox)


def _forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_flash_attention. The output has the query's strides, as the meta function promises."""
    found = None
    if not return_debug_mask:
        out = torch.empty_like(query)
        q, k, v, o = dense(query, key, value, out)
        found = _attend(
            q, k, v, o, _packed(None, None, None, None), dropout_p, (None, 0 if is_causal else None, False), scale
        )
    if found is None:
        return torchs.call_boxed(keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
    _, lse, rng_state, offset, debug_mask = found
    return out, lse, None, None, query.shape[2], key.shape[2], rng_state, offset, debug_mask


def _backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_flash_attention_backward. The gradients have their inputs' strides."""
    q, k, v = dense(query, key, value)
    band = (None, 0 if is_causal else None, False)
    spec = specify(q, k, v, None, band, scale, dropout_p)
    backend = None if spec is None else taker("attention_bwd", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
            philox_seed, philox_offset, scale=scale,
        )  # fmt: skip
    do, o = dense(grad_out, out)
    philox = philox_seed.view(torch.int64) if dropout_p > 0 else None
    found = differentiate(backend, spec, do, q, k, v, o, logsumexp, None, None, None, philox)
    return tuple(laid_like(t, gradient) for t, gradient in zip((query, key, value), found, strict=True))


KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_inplace,
    "_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_flash_attention": _forward,
    "_scaled_dot_product_flash_attention_backward": _backward,
}
