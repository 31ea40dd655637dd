"""The backend `reference`: the formula in plain PyTorch, written into the op's outputs. It takes every valid call.

Gradients are written out rather than taken by autograd, because an op may run where autograd is switched off.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops.attention import _formula, reference

Tensor = torch.Tensor


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
    with torch.no_grad():
        found = reference.attend(spec, q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, philox)
        o.copy_(found[0])
        lse.copy_(found[1])


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
    with torch.no_grad():
        if cu_seqlens_q is None:
            block = reference.dense_block(q, k, v, mask, bias, alibi_slopes, sinks, philox)
            found = _formula.attend_backward(spec, block, lse, do, dlse)
            _write(found, dq, dk, dv, _formula.pair_block(dbias, None, 0, 0), dsinks)
            return
        for i, rows_q, rows_k in _formula.packed_ranges(cu_seqlens_q, cu_seqlens_k):
            block = _formula.packed_block(i, rows_q, rows_k, q, k, v, mask, bias, alibi_slopes, sinks, philox)
            dlse_rows = None if dlse is None else dlse[None, :, rows_q]
            found = _formula.attend_backward(spec, block, lse[None, :, rows_q], do[rows_q][None], dlse_rows)
            lengths = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
            dbias_block = _formula.pair_block(dbias, i, *lengths)
            _write(found, dq[rows_q][None], dk[rows_k][None], dv[rows_k][None], dbias_block, dsinks)


def _write(
    found: _formula.Gradients, dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None, dsinks: Tensor | None
) -> None:
    dq.copy_(found.dq)
    dk.copy_(found.dk)
    dv.copy_(found.dv)
    if dbias is not None:
        dbias.add_(found.ds.sum_to_size(dbias.shape))
    if dsinks is not None and found.dsinks is not None:
        dsinks.add_(found.dsinks)


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
    with torch.no_grad():
        s = _formula.scores(spec, reference.dense_block(q, k, None, mask, bias, alibi_slopes)).s
        out.copy_(_formula.probabilities(s, lse.to(s.dtype)))


def weights_backward(
    spec: Any,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dlse: Tensor,
    dbias: Tensor | None,
) -> None:
    """dS = P dP and dlse = -rowsum(dS), because lse is an argument of its own here."""
    with torch.no_grad():
        block = reference.dense_block(q, k, None, mask, bias, alibi_slopes)
        found = _formula.scores(spec, block)
        ds = _formula.probabilities(found.s, lse.to(found.s.dtype)) * dout.to(found.s.dtype)
        if found.visible is not None:
            ds = ds.where(found.visible, 0)
        gradients = _formula.score_gradients(spec, block, found, ds)
        dq.copy_(gradients[0])
        dk.copy_(gradients[1])
        dlse.copy_(-ds.sum(-1))
        if dbias is not None:
            dbias.add_(ds.sum_to_size(dbias.shape))


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
    with torch.no_grad():
        found = reference.attend_cache(
            spec, q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, alibi_slopes, sinks
        )
        o.copy_(found[0])
        lse.copy_(found[1])
