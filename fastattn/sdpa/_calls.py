"""What the operators of every device share: a call of torch's as a specification of ours, and who takes it.

torch's tensors are [batch, nheads, seqlen, headdim] and ours [batch, seqlen, nheads, headdim]; all of these are views.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops._dispatch import Backend, choose, forced_backend
from fastattn.ops.attention import _philox
from fastattn.ops.attention.backends import BACKENDS
from fastattn.ops.attention.spec import AttentionSpec, check_attention

Tensor = torch.Tensor


def taker(op: str, spec: AttentionSpec) -> Backend | None:
    """The backend that serves a call; None when only the reference would, which torch's own kernel beats.

    A forced backend is obeyed, the reference included.
    """
    forced = forced_backend(None)
    if forced is not None:
        return choose(op, BACKENDS, spec, forced)
    return next((b for b in BACKENDS if b.name != "reference" and not b.objections(spec)), None)


def specify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    band: tuple[int | None, int | None, bool],
    scale: float | None,
    dropout_p: float,
    packed: tuple[Any, ...] = (None, None, None, None),
) -> AttentionSpec | None:
    """None for what only torch's kernels know: rows that are not contiguous. packed: cu_seqlens and longest lengths."""
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return None
    cu_q, cu_k, max_q, max_k = packed
    return check_attention(q, k, v, None, bias, None, None, cu_q, cu_k, max_q, max_k, *band, scale, None, dropout_p)


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """torch's [batch, nheads, seqlen, headdim] as ours, [batch, seqlen, nheads, headdim]; views."""
    return tuple(t.transpose(1, 2) for t in tensors)


def ours_fits(query: Tensor) -> bool:
    """Has an output in our layout, contiguous, the strides of torch.empty_like(query)? (Those of a size 1 do not count.)"""
    batch, heads, rows, _ = query.stride()
    return batch >= rows >= heads or (query.shape[2] == 1 and batch >= heads)


def laid_like(t: Tensor, gradient: Tensor) -> Tensor:
    """A gradient of our layout, contiguous, as torch's with the strides of torch.empty_like(t)."""
    gradient = gradient.transpose(1, 2)
    return gradient if ours_fits(t) else torch.empty_like(t).copy_(gradient)


def attend(
    backend: Backend,
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fills out, in our layout. Returns lse and what decides over dropout: (seed, offset), int64 [2]."""
    o = out if out.stride(-1) == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    rows = (spec.nheads, q.shape[0]) if spec.packed else (spec.batch, spec.nheads, spec.seqlen_q)
    lse = q.new_empty(rows, dtype=torch.float32)
    drops = _philox.draw(q.device) if spec.dropout_p > 0 else None
    backend.impl.forward(spec, q, k, v, o, lse, None, bias, None, None, cu_seqlens_q, cu_seqlens_k, drops)
    if o is not out:
        out.copy_(o)
    return lse, drops


def differentiate(
    backend: Backend,
    spec: AttentionSpec,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
    dbias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in our layout, contiguous. dbias: float32 zeros that the gradient of bias is to be written to."""
    do, o = (t if t.stride(-1) == 1 else t.contiguous() for t in (do, o))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    backend.impl.backward(
        spec, do, None, q, k, v, o, lse.contiguous(), None, bias, None, None, cu_seqlens_q, cu_seqlens_k, philox,
        dq, dk, dv, dbias, None,
    )  # fmt: skip
    return dq, dk, dv
