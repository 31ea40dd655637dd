"""The attention formula on dense blocks in plain PyTorch, and its gradient written out.

A block is a batch of sequences of equal length; a packed call is one block per sequence. Products run in the dtype of q
(as plain PyTorch would), scores and softmax in float32, or in float64 throughout.

Invisible pairs must not matter even if they hold NaN, and 0 * NaN is NaN. So when any input is not finite the products
take a slower road that forms every pair (query, key, d) and selects before it multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention import _philox


class Block(NamedTuple):
    """One batch of equally long sequences. q [batch, seqlen_q, nheads, headdim]; k, v likewise; pairs are 4-D."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None  # None: only the probabilities are wanted
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None  # [batch or 1, nheads, 1, 1]
    sinks: torch.Tensor | None  # [nheads]
    philox: torch.Tensor | None
    first_batch: int  # of the whole call, for dropout


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def slope_table(alibi_slopes: torch.Tensor | None) -> torch.Tensor | None:
    """[nheads] or [batch, nheads] -> [batch or 1, nheads, 1, 1]."""
    return None if alibi_slopes is None else alibi_slopes.view(-1, alibi_slopes.shape[-1], 1, 1)


def pair_block(pairs: torch.Tensor | None, i: int | None, seqlen_q: int, seqlen_k: int) -> torch.Tensor | None:
    """The 4-D view of a mask or bias; with i, of packed sequence i. Broadcast dimensions stay of size 1."""
    if pairs is None:
        return None
    pairs = pairs[(None,) * (4 - pairs.ndim)]
    if i is None:
        return pairs
    if pairs.shape[0] > 1:
        pairs = pairs[i : i + 1]
    if pairs.shape[2] > 1:
        pairs = pairs[:, :, :seqlen_q]
    return pairs[..., :seqlen_k] if pairs.shape[3] > 1 else pairs


def packed_ranges(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None) -> Iterator[tuple[int, slice, slice]]:
    """(sequence, its rows of q, its rows of k) for each packed sequence."""
    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        yield i, slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])


def packed_block(
    i: int,
    rows_q: slice,
    rows_k: slice,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    philox: torch.Tensor | None,
) -> Block:
    """Sequence i of a packed call as a block of batch 1."""
    lengths = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
    slopes = slope_table(alibi_slopes)
    if slopes is not None and slopes.shape[0] > 1:
        slopes = slopes[i : i + 1]
    mask, bias = pair_block(mask, i, *lengths), pair_block(bias, i, *lengths)
    return Block(q[rows_q][None], k[rows_k][None], v[rows_k][None], mask, bias, slopes, sinks, philox, i)


def by_head(x: torch.Tensor, nheads_k: int) -> torch.Tensor:
    """[batch, seqlen, nheads, d] -> [batch, nheads_k, group, seqlen, d]; query head h reads key head h // group."""
    return x.unflatten(2, (nheads_k, -1)).permute(0, 2, 3, 1, 4)


def by_row(x: torch.Tensor) -> torch.Tensor:
    """The inverse of by_head."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _query_key(x: torch.Tensor, y: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """[..., m, d] x [..., n, d] -> [..., m, n]; with `visible`, pair by pair."""
    if visible is None:
        return x @ y.transpose(-1, -2)
    cells = visible.unsqueeze(-1)
    pairs = x.unsqueeze(-2).where(cells, 0).to(_wide(x)) * y.unsqueeze(-3).where(cells, 0)
    return pairs.sum(-1).to(x.dtype)


def _weigh_keys(weights: torch.Tensor, y: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """[..., m, n] x [..., n, d] -> [..., m, d]."""
    weights = weights.to(y.dtype)
    if visible is None:
        return weights @ y
    return (weights.unsqueeze(-1).to(_wide(y)) * y.unsqueeze(-3).where(visible.unsqueeze(-1), 0)).sum(-2).to(y.dtype)


def _weigh_queries(weights: torch.Tensor, x: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """[..., m, n] x [..., m, d] -> [..., n, d], summed over the query heads of a group (dimension 2)."""
    weights = weights.to(x.dtype)
    if visible is None:
        return (weights.transpose(-1, -2) @ x).sum(2, keepdim=True, dtype=_wide(x)).to(x.dtype)
    pairs = weights.unsqueeze(-1).to(_wide(x)) * x.unsqueeze(-2).where(visible.unsqueeze(-1), 0)
    return pairs.sum((2, -3)).unsqueeze(2).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return statistics_dtype(x.dtype)


class Scores(NamedTuple):
    """s [batch, nheads, seqlen_q, seqlen_k], -inf where invisible; tanh of the softcap; which pairs are visible."""

    s: torch.Tensor
    tanh: torch.Tensor | None
    visible: torch.Tensor | None  # None: every pair
    pairwise: torch.Tensor | None  # `visible` by head group where products must go pair by pair, else None


def _visible(spec: Any, block: Block, seqlen_q: int, seqlen_k: int) -> torch.Tensor | None:
    visible = None
    if spec.left is not None or spec.right is not None:
        distance = _distance(spec, seqlen_q, seqlen_k, block.q.device)
        visible = torch.ones_like(distance, dtype=torch.bool)
        if spec.left is not None:
            visible = visible & (distance <= spec.left)
        if spec.right is not None:
            visible = visible & (-distance <= spec.right)
    if block.mask is not None:
        visible = block.mask if visible is None else visible & block.mask
    if block.bias is not None:
        hidden = block.bias.detach() == float("-inf")
        if visible is not None or bool(hidden.any()):
            visible = ~hidden if visible is None else visible & ~hidden
    if visible is None:
        return None
    return visible.expand(block.q.shape[0], block.q.shape[2], seqlen_q, seqlen_k)


def _distance(spec: Any, seqlen_q: int, seqlen_k: int, device: torch.device) -> torch.Tensor:
    """m + offset - n, [seqlen_q, seqlen_k]: how far key n lies before the diagonal of query m."""
    offset = 0 if spec.upper_left else seqlen_k - seqlen_q
    return torch.arange(seqlen_q, device=device)[:, None] + offset - torch.arange(seqlen_k, device=device)


def scores(spec: Any, block: Block, dout: torch.Tensor | None = None) -> Scores:
    """scale -> softcap -> ALiBi -> bias, then -inf for what a query may not see."""
    q, k = block.q, block.k
    seqlen_q, seqlen_k, nheads_k = q.shape[1], k.shape[1], k.shape[2]
    visible = _visible(spec, block, seqlen_q, seqlen_k)
    pairwise = None
    if visible is not None and not all(bool(x.isfinite().all()) for x in (q, k, block.v, dout) if x is not None):
        pairwise = visible.unflatten(1, (nheads_k, -1))
    s = _query_key(by_head(q, nheads_k), by_head(k, nheads_k), pairwise).flatten(1, 2)
    s = s.to(_wide(q)) * spec.scale
    tanh = None
    if spec.softcap is not None:
        tanh = torch.tanh(s / spec.softcap)
        s = spec.softcap * tanh
    if block.alibi_slopes is not None:
        s = s - block.alibi_slopes.to(s.dtype) * _distance(spec, seqlen_q, seqlen_k, q.device).abs()
    if block.bias is not None:
        s = s + block.bias.to(s.dtype)
    if visible is not None:
        s = s.where(visible, float("-inf"))
    return Scores(s, tanh, visible, pairwise)


def softmax(s: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and lse; a row of -inf gives 0 and -inf, with zero gradient. A sink joins the sum only."""
    if s.shape[-1] > 0:
        top = s.detach().amax(-1, keepdim=True)
    else:
        top = s.new_full((*s.shape[:-1], 1), float("-inf"))
    sink = None if sinks is None else sinks.to(s.dtype).view(1, -1, 1, 1)
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.where(top != float("-inf"), 0)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = total.where(~empty, 1)
    lse = (top + total.log()).where(~empty, float("-inf"))
    return weights / total, lse.squeeze(-1)


def probabilities(s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(s - lse), 0 in rows whose lse is -inf."""
    lse = lse.unsqueeze(-1)
    return torch.exp(s - lse.where(lse != float("-inf"), 0)).where(lse != float("-inf"), 0)


def _dropout(spec: Any, block: Block, p: torch.Tensor) -> torch.Tensor:
    if spec.dropout_p == 0.0:
        return p
    assert block.philox is not None
    keep = _philox.keep_mask(block.philox, spec.dropout_p, block.first_batch, *p.shape)
    return (p * (1.0 / (1.0 - spec.dropout_p))).where(keep, 0)


def attend(spec: Any, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """o [batch, seqlen_q, nheads, headdim_v] and lse [batch, nheads, seqlen_q] of a block; differentiable."""
    assert block.v is not None
    s, _, _, pairwise = scores(spec, block)
    p, lse = softmax(s, block.sinks)
    nheads_k = block.k.shape[2]
    p = _dropout(spec, block, p).unflatten(1, (nheads_k, -1))
    return by_row(_weigh_keys(p, by_head(block.v, nheads_k), pairwise)), lse


class Gradients(NamedTuple):
    """Like the tensors they belong to; ds [batch, nheads, seqlen_q, seqlen_k] is the gradient of a full-size bias."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    ds: torch.Tensor
    dsinks: torch.Tensor | None  # [nheads]


def attend_backward(
    spec: Any, block: Block, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> Gradients:
    """dS = P (dP - delta) with delta = rowsum(P dP) - dlse; README.md derives it."""
    assert block.v is not None
    nheads_k = block.k.shape[2]
    found = scores(spec, block, dout)
    p = probabilities(found.s, lse.to(found.s.dtype))
    if found.visible is not None:
        p = p.where(found.visible, 0)  # a row that holds NaN must not reach the keys it may not see
    dout_heads, v_heads = by_head(dout, nheads_k), by_head(block.v, nheads_k)
    dv = _weigh_queries(_dropout(spec, block, p).unflatten(1, (nheads_k, -1)), dout_heads, found.pairwise)
    dp = _query_key(dout_heads, v_heads, found.pairwise).flatten(1, 2).to(p.dtype)
    dp = _dropout(spec, block, dp)
    delta = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(p.dtype).unsqueeze(-1)
    ds = p * (dp - delta)
    if found.visible is not None:
        ds = ds.where(found.visible, 0)
    dq, dk = score_gradients(spec, block, found, ds)
    dsinks = None
    if block.sinks is not None:
        sink = block.sinks.to(p.dtype).view(1, -1, 1, 1).expand(*p.shape[:-1], 1)
        dsinks = -(probabilities(sink, lse.to(p.dtype)) * delta).sum((0, 2, 3))
    return Gradients(dq, dk, by_row(dv), ds, dsinks)


def score_gradients(spec: Any, block: Block, found: Scores, ds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dq and dk from the gradient of the scores."""
    nheads_k = block.k.shape[2]
    if found.tanh is not None:
        ds = ds * (1 - found.tanh * found.tanh)
        if found.visible is not None:
            ds = ds.where(found.visible, 0)
    ds = (ds * spec.scale).unflatten(1, (nheads_k, -1))
    dq = _weigh_keys(ds, by_head(block.k, nheads_k), found.pairwise)
    dk = _weigh_queries(ds, by_head(block.q, nheads_k), found.pairwise)
    return by_row(dq), by_row(dk)
