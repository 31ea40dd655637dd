"""Attention in plain PyTorch: any device, any dtype, every option, differentiable. Kernels are held to this law.

The signatures are those of the public functions; `backend`, `deterministic` and `num_splits` are accepted and mean
nothing here. In float64 this is the truth; in a lower dtype it rounds where plain PyTorch code would (products in the
dtype, softmax in float32), which makes it the error that kernels are allowed to make twice.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops.attention import _formula, _philox
from fastattn.ops.attention.kvcache_spec import check_kvcache
from fastattn.ops.attention.spec import band, check_attention

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
) -> Tensor | tuple[Tensor, Tensor]:
    """fastattn.attention in plain PyTorch; lse is float64 for float64 inputs."""
    spec = check_attention(
        q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        *band("attention", causal, window), scale, softcap, dropout_p,
    )  # fmt: skip
    philox = _philox.draw(q.device) if dropout_p > 0.0 else None
    o, lse = attend(spec, q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox)
    return (o, lse) if return_lse else o


def attend(
    spec: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o and lse of a validated call, packed or not."""
    if cu_seqlens_q is None:
        return _formula.attend(spec, dense_block(q, k, v, mask, bias, alibi_slopes, sinks, philox))
    outputs = [q.new_empty(0, spec.nheads, spec.headdim_v)]
    lses = [q.new_empty(spec.nheads, 0, dtype=_formula.statistics_dtype(q.dtype))]
    for i, rows_q, rows_k in _formula.packed_ranges(cu_seqlens_q, cu_seqlens_k):
        block = _formula.packed_block(i, rows_q, rows_k, q, k, v, mask, bias, alibi_slopes, sinks, philox)
        o, lse = _formula.attend(spec, block)
        outputs.append(o[0])
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, dim=1)


def dense_block(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
) -> _formula.Block:
    """A whole call that is not packed, as one block."""
    mask, bias = _formula.pair_block(mask, None, 0, 0), _formula.pair_block(bias, None, 0, 0)
    return _formula.Block(q, k, v, mask, bias, _formula.slope_table(alibi_slopes), sinks, philox, 0)


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
    """fastattn.attention_weights in plain PyTorch: exp(score - lse)."""
    spec = check_attention(
        q, k, k, mask, bias, alibi_slopes, None, None, None, None, None,
        *band("attention_weights", causal, window), scale, softcap, 0.0, op="attention_weights",
    )  # fmt: skip
    s = _formula.scores(spec, dense_block(q, k, None, mask, bias, alibi_slopes)).s
    return _formula.probabilities(s, lse.to(s.dtype)).to(q.dtype)


def merge_attention(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """fastattn.merge_attention: lse = logaddexp, o the mean weighted by exp(lse); two empty rows stay empty."""
    wide = torch.promote_types(lse_a.dtype, torch.float32)
    lse_a, lse_b = lse_a.to(wide), lse_b.to(wide)
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.where(top != float("-inf"), 0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    empty = total == 0
    total = total.where(~empty, 1)
    share_a, share_b = (
        (w / total).transpose(-1, -2).unsqueeze(-1) for w in (weight_a, weight_b)
    )  # [.., seqlen, heads, 1]
    o = share_a * o_a.to(wide) + share_b * o_b.to(wide)
    return o.to(o_a.dtype), (top + total.log()).where(~empty, float("-inf"))


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
) -> Tensor | tuple[Tensor, Tensor]:
    """fastattn.attention_kvcache in plain PyTorch: append to the caches, then attend, one sequence at a time."""
    spec = check_kvcache(
        q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, alibi_slopes, sinks, interleaved,
        *band("attention_kvcache", causal, window), scale, softcap, num_splits,
    )  # fmt: skip
    o, lse = attend_cache(spec, q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, alibi_slopes, sinks)
    return (o, lse) if return_lse else o


def attend_cache(
    spec: Any,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o and lse of a validated call."""
    outputs = [q.new_empty(0, spec.seqlen_q, spec.nheads, spec.headdim_v)]
    lses = [q.new_empty(0, spec.nheads, spec.seqlen_q, dtype=_formula.statistics_dtype(q.dtype))]
    slopes = _formula.slope_table(alibi_slopes)
    for i, present in enumerate(cache_seqlens.tolist()):
        q_rows = q[i]
        if cos is not None and sin is not None:
            q_rows = rotate(q_rows, cos, sin, present, spec.interleaved)
        if k is not None and v is not None:
            k_rows = k[i] if cos is None or sin is None else rotate(k[i], cos, sin, present, spec.interleaved)
            _slots_write(k_cache, block_table, i, present, k_rows)
            _slots_write(v_cache, block_table, i, present, v[i])
        total = present + spec.seqlen_new
        keys, values = (_slots_read(cache, block_table, i, total)[None] for cache in (k_cache, v_cache))
        slope = None if slopes is None else slopes[i : i + 1] if slopes.shape[0] > 1 else slopes
        o, lse = _formula.attend(spec, _formula.Block(q_rows[None], keys, values, None, None, slope, sinks, None, i))
        outputs.append(o)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, first: int, interleaved: bool) -> Tensor:
    """RoPE of x [seqlen, nheads, headdim] at positions first, first + 1, ...; the part beyond rotary_dim is kept."""
    half = cos.shape[1]
    wide = _formula.statistics_dtype(x.dtype)
    cos, sin = (t[first : first + x.shape[0], None].to(wide) for t in (cos, sin))
    turned = x[..., : 2 * half].to(wide)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def _slots(
    cache: Tensor, block_table: Tensor | None, i: int, first: int, count: int
) -> tuple[Tensor | int, Tensor | slice]:
    """The index of slots [first, first + count) of sequence i."""
    if block_table is None:
        return i, slice(first, first + count)
    n = torch.arange(first, first + count, device=cache.device)
    return block_table[i, n // cache.shape[1]].long(), n % cache.shape[1]


def _slots_read(cache: Tensor, block_table: Tensor | None, i: int, count: int) -> Tensor:
    return cache[_slots(cache, block_table, i, 0, count)]


def _slots_write(cache: Tensor, block_table: Tensor | None, i: int, first: int, rows: Tensor) -> None:
    cache[_slots(cache, block_table, i, first, rows.shape[0])] = rows
