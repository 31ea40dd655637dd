"""Softmax attention: the public functions. README.md has the algorithm, op.py what autograd and torch.compile see."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops._check import fail, is_tensor, same_device, shape
from fastattn.ops._dispatch import forced_backend
from fastattn.ops.attention import _philox, op, reference
from fastattn.ops.attention.spec import band, check_dropout

__all__ = ["attention", "attention_kvcache", "attention_weights", "merge_attention", "scaled_dot_product_attention"]

Tensor = torch.Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """o = softmax(scale · q kᵀ + bias) v over the keys a query may see, without storing the scores.

    q             [batch, seqlen_q, nheads, headdim] float32, bfloat16, float16 or float64; any strides, unit last
    k, v          [batch, seqlen_k, nheads_k, headdim] and [..., headdim_v], as q; nheads_k divides nheads (GQA, MQA)
    causal        True: query m sees key n when n <= m + seqlen_k - seqlen_q; "upper_left": when n <= m
    window        (left, right): also m + offset - left <= n <= m + offset + right around that diagonal (bottom-right
                  without causal); None is unbounded
    scale         default headdim ** -0.5
    softcap       scores become softcap · tanh(score / softcap), before alibi_slopes and bias
    mask          bool, True = may attend, broadcastable to [batch, nheads, seqlen_q, seqlen_k]
    bias          float32 or q's dtype, broadcastable likewise, added to the scores; -inf hides a key
    alibi_slopes  [nheads] or [batch, nheads] float32: score - slope · |m + offset - n|
    sinks         [nheads] float32 or q's dtype: one more logit per head in the denominator
    dropout_p     in [0, 1): probabilities are dropped by a counter-based generator seeded from torch's
    cu_seqlens_q  [batch + 1] int32: q, k, v are packed, [total, nheads, headdim]; sequence i is rows cu[i] : cu[i + 1].
                  cu_seqlens_k=None is that of q; max_seqlen_q, max_seqlen_k bound the lengths, computed when None
    deterministic bit-reproducible gradients; None follows torch.use_deterministic_algorithms. On a CPU always
    backend       force "cuda", "triton", "cpu" or "reference", for the forward and its backward

    Returns o [batch, seqlen_q, nheads, headdim_v] in q's dtype, contiguous; with return_lse also lse [batch, nheads,
    seqlen_q] ([nheads, total_q] packed), float32 (float64 for float64), natural log, sink included.
    A query that sees no key has o = 0, lse = -inf and zero gradient; what it may not see does not matter, even NaN.
    Differentiable in q, k, v, bias and sinks, through o and through lse. Under autocast q, k, v are cast like SDPA's.
    Raises ValueError when an argument is wrong, UnsupportedError with each backend's reasons when none takes the call.

    Dao, FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2.
    >>> o = fastattn.attention(q, k, v, causal=True)
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        q, k, v = _autocast(q, k, v)
    left = right = None
    upper_left = False
    if causal is not False or window is not None:
        left, right, upper_left = band("attention", causal, window)
    philox = None
    if dropout_p:
        check_dropout("attention", dropout_p)
        is_tensor("attention", "q", q)
        philox = _philox.draw(q.device)
    o, lse = op.attention_fwd(
        q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox, max_seqlen_q, max_seqlen_k,
        left, right, upper_left, scale, softcap, dropout_p, deterministic, forced_backend(backend),
    )  # fmt: skip
    return (o, lse) if return_lse else o


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    causal: bool | str = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """o = softmax(scale · q kᵀ) v over the keys of a cache, after appending the new k, v to it in place.

    q              [batch, seqlen_q, nheads, headdim] float32, bfloat16, float16 or float64, unit last stride
    k_cache        [batch, capacity, nheads_k, headdim], or paged [num_blocks, block_size, nheads_k, headdim]; like q
    v_cache        likewise with headdim_v; the caches are read where they lie, never copied
    cache_seqlens  [batch] int32: the keys present before the call. Slots beyond may hold anything, NaN included
    k, v           [batch, seqlen_new, nheads_k, headdim(_v)]: written to the slots from cache_seqlens on
    block_table    [batch, max_blocks] int32: slot n of sequence b lies in block block_table[b, n // block_size]; sequences
                   may read the same blocks, but no slot may be appended to twice (checked on CPUs)
    cos, sin       [seqlen, rotary_dim / 2] float32 or q's dtype: q and the new k are rotated at positions
                   cache_seqlens + i (they need k); interleaved pairs (2i, 2i + 1) instead of halves
    causal         True: query m sees key n when n <= m + total - seqlen_q, total = cache_seqlens + seqlen_new
    num_splits     how many parts the keys of a sequence are computed in; None chooses by their number
    window, scale, softcap, alibi_slopes, sinks, return_lse, backend as in `attention`

    Returns o [batch, seqlen_q, nheads, headdim_v] in q's dtype; with return_lse also lse [batch, nheads, seqlen_q].
    A query that sees no key has o = 0 and lse = -inf. Not differentiable: gradients asked for are an error.
    Raises ValueError when an argument is wrong (on a CPU also lengths and blocks out of range), before anything is
    written; UnsupportedError when no backend takes the call.

    Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention, arXiv:2309.06180.
    >>> o = fastattn.attention_kvcache(q, k_cache, v_cache, lengths, k=k, v=v)
    """
    run = op.attention_kvcache if k is None and v is None else op.attention_kvcache_append
    o, lse = run(
        q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, alibi_slopes, sinks, interleaved,
        *band("attention_kvcache", causal, window), scale, softcap, num_splits, forced_backend(backend),
    )  # fmt: skip
    return (o, lse) if return_lse else o


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """P = exp(score - lse): the probabilities that `attention` used, for those who must look at them.

    q, k    as in `attention`, not packed
    lse     [batch, nheads, seqlen_q] float32 (float64 for float64), from `attention(..., return_lse=True)`
    the other arguments as they were in that call; sinks are in lse already

    Returns [batch, nheads, seqlen_q, seqlen_k] in q's dtype, 0 for pairs that are not visible and for empty rows.
    Differentiable in q, k, bias and lse, each an argument of its own: with the lse of `attention` their gradients add
    up to that of the softmax. The backward is plain PyTorch on every backend.
    Raises ValueError when an argument is wrong, UnsupportedError when no backend takes the call.

    >>> o, lse = fastattn.attention(q, k, v, return_lse=True)
    >>> p = fastattn.attention_weights(q, k, lse)
    """
    return op.attention_weights(
        q, k, lse, mask, bias, alibi_slopes, *band("attention_weights", causal, window), scale, softcap,
        forced_backend(backend),
    )  # fmt: skip


def merge_attention(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys: lse = log(eᵃ + eᵇ), o = (eᵃ o_a + eᵇ o_b) / (eᵃ + eᵇ).

    o_a, o_b      [batch, seqlen_q, nheads, headdim_v] (packed: [total_q, nheads, headdim_v]), a floating dtype
    lse_a, lse_b  [batch, nheads, seqlen_q] (packed: [nheads, total_q]) natural log; -inf for a part without keys

    Returns o in o_a's dtype and lse, float32 (float64 for float64). Two empty parts give o = 0, lse = -inf.
    Differentiable in all four. Raises ValueError when shapes or devices do not fit each other.

    >>> parts = [fastattn.attention(q, k, v, return_lse=True) for k, v in ((k1, v1), (k2, v2))]
    >>> o, lse = fastattn.merge_attention(*parts[0], *parts[1])
    """
    name = "merge_attention"
    for argument, t in (("o_a", o_a), ("lse_a", lse_a), ("o_b", o_b), ("lse_b", lse_b)):
        is_tensor(name, argument, t)
        same_device(name, argument, t, "o_a", o_a.device)
        if not t.is_floating_point():
            fail(name, argument, "floating", t.dtype)
    if o_a.dim() not in (3, 4):
        fail(name, "o_a", "[batch, seqlen_q, nheads, headdim_v] or [total_q, nheads, headdim_v]", tuple(o_a.shape))
    *batch, rows, nheads, _ = o_a.shape
    shape(name, "o_b", o_b, o_a.shape, "of o_a")
    shape(name, "lse_a", lse_a, (*batch, nheads, rows), "[batch, nheads, seqlen_q] of o_a")
    shape(name, "lse_b", lse_b, (*batch, nheads, rows), "[batch, nheads, seqlen_q] of o_a")
    return reference.merge_attention(o_a, lse_a, o_b, lse_b)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with torch's arguments, layout and meaning.

    query       [batch, nheads, seqlen_q, headdim], or without the batch; views of `attention`'s layout, no copies
    key, value  [batch, nheads, seqlen_k, headdim] and [..., headdim_v]; fewer heads only with enable_gqa
    attn_mask   bool (True = may attend) or floating (added to the scores), broadcastable to [.., seqlen_q, seqlen_k]
    is_causal   query m sees key n when n <= m (upper left); not together with attn_mask

    Returns [batch, nheads, seqlen_q, headdim_v]. A query that sees no key gives 0.
    Raises ValueError when an argument is wrong, UnsupportedError when no backend takes the call.

    >>> o = fastattn.scaled_dot_product_attention(query, key, value, is_causal=True)
    """
    name = "scaled_dot_product_attention"
    for argument, t in (("query", query), ("key", key), ("value", value)):
        is_tensor(name, argument, t)
        if t.dim() not in (3, 4) or t.dim() != query.dim():
            fail(
                name,
                argument,
                "[batch, nheads, seqlen, headdim] or [nheads, seqlen, headdim] like query",
                tuple(t.shape),
            )
    if is_causal and attn_mask is not None:
        fail(name, "attn_mask", "None when is_causal is set", "a mask")
    if not enable_gqa and key.shape[-3] != query.shape[-3]:
        fail(name, "key", f"of the nheads of query ({query.shape[-3]}) unless enable_gqa is set", key.shape[-3])
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    batched = query.dim() == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    o = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal="upper_left" if is_causal else False,
        scale=scale,
        mask=attn_mask if boolean else None,
        bias=None if boolean else attn_mask,
        dropout_p=dropout_p,
    ).transpose(1, 2)
    return o if batched else o[0]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast for their device: cast to its dtype, except float64, as torch does for SDPA."""

    def cast(t: Tensor) -> Tensor:
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        kind = t.device.type
        return t.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else t

    return tuple(cast(t) for t in tensors)
