"""Who else computes attention on a GPU. q, k, v are [batch, seqlen, heads, headdim]; every rival sees its own layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..case import AbsentError
from ..rivals import compiled
from ..shapes import AttentionShape

Tensor = torch.Tensor
BACKENDS = {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION", "SDPA efficient": "EFFICIENT_ATTENTION"}


def sdpa(
    name: str, shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None
) -> Callable[[], Tensor]:
    """One backend of torch's SDPA and no other; `extra` is its attn_mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, BACKENDS[name], None)
    if backend is None:
        raise AbsentError(f"this torch has no {BACKENDS[name]}")
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    causal = shape.causal and extra is None and shape.seqlen_q > 1
    gqa = shape.kv_heads != shape.nheads

    def call() -> Tensor:
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=extra, is_causal=causal, enable_gqa=gqa)
        return o.transpose(1, 2)

    return call


def flash_attention_4(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as missing:
        raise AbsentError(f"flash-attn-4 is not installed ({missing})") from None

    def call() -> Tensor:
        o = flash_attn_func(q, k, v, causal=shape.causal)
        return o[0] if isinstance(o, tuple) else o

    return call


def varlen(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Callable[[], Tensor]:
    """torch.nn.attention.varlen, FlashAttention 2 on packed sequences."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise AbsentError("this torch has no torch.nn.attention.varlen") from None
    longest = max(shape.lengths)
    call: Any = functools.partial(varlen_attn, q[0], k[0], v[0], bounds, bounds, longest, longest)
    if not shape.causal:
        return lambda: call()[None]
    try:
        call(window_size=(-1, 0))
    except TypeError:  # before torch 2.11 the argument had another name
        return lambda: call(is_causal=True)[None]
    return lambda: call(window_size=(-1, 0))[None]


def flex(
    shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sequence: Tensor | None
) -> Callable[[], Tensor]:
    """FlexAttention, compiled. `sequence` numbers the packed sequence of each token."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    offset = shape.seqlen_k - shape.seqlen_q
    lengths = torch.tensor(shape.lengths or (shape.seqlen_k,) * shape.batch, device=q.device)
    reach = shape.seqlen_k if shape.window is None else shape.window

    def seen(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        if sequence is not None:
            together = sequence[m] == sequence[n]
            return together & (n <= m) if shape.causal else together
        if shape.causal:
            return (n <= m + offset) & (n >= m + offset - reach)
        return n < lengths[b]

    def biased(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[0, h, m, n]

    block_mask = None
    if shape.causal or shape.lengths:
        batch = shape.batch if shape.lengths and sequence is None else None
        block_mask = create_block_mask(seen, batch, None, shape.seqlen_q, shape.seqlen_k, device=q.device.type)
    call = compiled(flex_attention)
    options: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": shape.kv_heads != shape.nheads}
    if bias is not None:
        options["score_mod"] = biased
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: call(q_, k_, v_, **options).transpose(1, 2)


def flashinfer_decode(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """One sequence at a time is all that FlashInfer decodes without a plan; a batch of one only."""
    try:
        import flashinfer
    except ImportError as missing:
        raise AbsentError(f"flashinfer is not installed ({missing})") from None
    if shape.batch != 1:
        raise AbsentError("FlashInfer is asked for one sequence only")
    return lambda: flashinfer.single_decode_with_kv_cache(q[0, 0], k[0], v[0])[None, None]
