"""PyTorch's own ways to the same result: SDPA, plain matrix products, FlexAttention, formulas, and those compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .case import AbsentError
from .shapes import AttentionShape

Tensor = torch.Tensor


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with static shapes, from a clean slate: earlier cases must not have used up its recompilations."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise AbsentError("torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# attention: q, k, v [batch, heads, seqlen, headdim]


def mask_for(shape: AttentionShape) -> Tensor | None:
    """The mask SDPA needs beyond `is_causal`: [batch or 1, 1, seqlen_q or 1, seqlen_k] bool, True = sees."""
    if shape.packed or shape.window is not None:
        return shape.visible(torch.arange(shape.seqlen_q))
    if shape.lengths:
        return shape.visible(torch.zeros(1, dtype=torch.long))
    return None


def sdpa(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    mask = mask_for(shape)
    causal = shape.causal and mask is None and shape.seqlen_q > 1
    gqa = shape.kv_heads != shape.nheads
    return lambda: F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias if mask is None else mask, is_causal=causal, enable_gqa=gqa
    )


def sdpa_repeat_kv(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Hugging Face's repeat_kv: keys and values are copied for every query head."""
    group = shape.nheads // shape.kv_heads

    def repeat(x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, group, n, d).reshape(b, h * group, n, d)

    return lambda: F.scaled_dot_product_attention(q, repeat(k), repeat(v))


def sdpa_folded(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Decoding: the query heads of a group become query rows, so that torch sees a matrix and not a vector."""
    folded = q.reshape(shape.batch, shape.kv_heads, shape.nheads // shape.kv_heads, shape.headdim)
    return lambda: F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)


def sdpa_per_sequence(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """A packed batch by a loop over its sequences."""
    parts = [tuple(x.split(shape.lengths, 2)) for x in (q, k, v)]
    return lambda: torch.cat(
        [F.scaled_dot_product_attention(a, b, c, is_causal=shape.causal) for a, b, c in zip(*parts, strict=True)],
        2,
    )


def plain(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """Two matrix products and a softmax, as in every tutorial. In bf16 oneDNN makes this PyTorch's fastest way."""
    group, scale = shape.nheads // shape.kv_heads, shape.headdim**-0.5
    hidden = None
    if shape.causal or shape.lengths or shape.window is not None:
        hidden = ~shape.visible(torch.arange(shape.seqlen_q))

    def attend() -> Tensor:
        keys, values = (k, v) if group == 1 else (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.matmul(q, keys.transpose(-1, -2)) * scale
        if bias is not None:
            scores = scores + bias
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.matmul(scores.softmax(-1), values)

    return attend


def flex(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as missing:
        raise AbsentError(f"this torch has no FlexAttention ({missing})") from None
    offset = shape.seqlen_k - shape.seqlen_q
    lengths = torch.tensor(shape.lengths or (shape.seqlen_k,) * shape.batch)
    reach = shape.seqlen_k if shape.window is None else shape.window

    def banded(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return (n <= m + offset) & (n >= m + offset - reach)

    def padded(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return n < lengths[b]

    def biased(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[0, h, m, n]

    if bias is not None and bias.shape[0] != 1:
        raise AbsentError("FlexAttention is asked only for a bias shared by the batch")
    block_mask = None
    if shape.causal or shape.lengths:
        batch = shape.batch if shape.lengths else None
        block_mask = create_block_mask(
            padded if shape.lengths else banded, batch, None, shape.seqlen_q, shape.seqlen_k, device="cpu"
        )
    call = compiled(flex_attention)
    gqa = shape.kv_heads != shape.nheads
    score_mod = biased if bias is not None else None
    return lambda: call(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa)


# norms and RoPE: the formulas of Hugging Face's models


def llama_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rotate_half_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [batch, heads, seqlen, headdim]; cos, sin [seqlen, headdim], both halves written out."""

    def rotate_half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
