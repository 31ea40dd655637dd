"""The backend `cpu`: hands the tensors of a call to the kernels in csrc/cpu."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.runtime import native

Tensor = torch.Tensor
_native = native.module()
_num_threads = torch.get_num_threads


def _options(spec: Any) -> tuple[Any, ...]:
    return (
        spec.left, spec.right, spec.upper_left, spec.scale, spec.softcap, spec.dropout_p, spec.seqlen_q, spec.seqlen_k,
        _num_threads(),
    )  # fmt: skip


def _float(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype is torch.float32 else t.float()


def forward(
    spec: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
) -> None:
    _native.attention_fwd(
        q, k, v, o, lse, mask, bias, alibi_slopes, _float(sinks), cu_seqlens_q, cu_seqlens_k, philox, _options(spec)
    )


def backward(
    spec: Any,
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dsinks: Tensor | None,
) -> None:
    _native.attention_bwd(
        q, k, v, o, lse, mask, bias, alibi_slopes, _float(sinks), cu_seqlens_q, cu_seqlens_k, philox, _options(spec),
        do, dlse, dq, dk, dv, dbias, dsinks,
    )  # fmt: skip


def weights(
    spec: Any,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
) -> None:
    _native.attention_weights(q, k, lse, mask, bias, alibi_slopes, None, None, _options(spec), out)


def kvcache(
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
    o: Tensor,
    lse: Tensor,
) -> None:
    if k is not None:
        assert v is not None
        if cos is not None and sin is not None:
            from fastattn.ops.rope import rope_qk

            positions = cache_seqlens[:, None] + torch.arange(q.shape[1], dtype=torch.int32)
            q, k = rope_qk(q, k, cos, sin, interleaved=spec.interleaved, position_ids=positions)
        _native.kvcache_append(k, v, k_cache, v_cache, cache_seqlens, block_table)
        cache_seqlens = cache_seqlens + spec.seqlen_new
    _native.attention_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        alibi_slopes,
        _float(sinks),
        o,
        lse,
        _options(spec),
        spec.num_splits or 0,
    )
