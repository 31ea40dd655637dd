"""Rotary position embedding: the public functions. `tables` builds cos and sin; README.md has the pictures."""

from __future__ import annotations

import torch

from fastattn.ops import _eager
from fastattn.ops._dispatch import forced_backend
from fastattn.ops.rope import op as _op
from fastattn.ops.rope import tables
from fastattn.ops.rope.spec import check_tensors

__all__ = ["rope", "rope_qk", "tables"]


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate pairs of each head by their position's angle: (a, b) -> (a cos - b sin, b cos + a sin) (arXiv:2104.09864).

    x             [batch, seqlen, nheads, headdim], or packed [total, nheads, headdim]; float32, bfloat16, float16 or
                  float64; any strides with a unit last stride (a bshd view of a bhsd tensor is free)
    cos, sin      [rows, rotary_dim / 2] or [batch, rows, rotary_dim / 2] (batch 1 broadcasts), of x's dtype or float32,
                  rotary_dim <= headdim; elements of a head past rotary_dim are copied
    interleaved   False pairs element i with i + rotary_dim / 2 (GPT-NeoX, Llama), True pairs 2i with 2i + 1 (GPT-J, DeepSeek)
    position_ids  [batch, seqlen] or [seqlen] ([total] packed), int32 or int64: the row of cos and sin of each position;
                  None takes the first seqlen rows

    Arithmetic is float32 (float64 for float64), rounded once. Returns a tensor of x's shape, dtype and order of
    strides. Differentiable in x; a table that requires grad is an error.
    Raises ValueError when an argument is wrong (an id outside the table included), UnsupportedError when a forced
    backend does not take the call.

    >>> cos, sin = fastattn.ops.rope.tables.plain(seqlen, headdim)
    >>> q = fastattn.rope(q, cos, sin)
    """
    if _eager.plain(x, cos, sin, position_ids):
        threads = torch.get_num_threads()
        y = _eager.door.rope_eager(x, None, cos, sin, position_ids, interleaved, threads)
        if y is not None:
            return y
    check_tensors("rope", x, cos, sin, position_ids)
    return _op.rope(x, cos, sin, position_ids, interleaved, False, forced_backend(None))


def rope_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` of q and of k in one pass over the tables.

    q         [batch, seqlen, nheads, headdim], k [batch, seqlen, nheads_k, headdim] of the same dtype, or both packed
    the rest  as in `rope`

    Returns the rotated q and k, each of its argument's shape, dtype and order of strides. Raises as `rope` does.

    >>> q, k = fastattn.rope_qk(q, k, cos, sin, position_ids=position_ids)
    """
    if k is not None and _eager.plain(q, k, cos, sin, position_ids):
        threads = torch.get_num_threads()
        pair = _eager.door.rope_eager(q, k, cos, sin, position_ids, interleaved, threads)
        if pair is not None:
            return pair
    check_tensors("rope_qk", q, cos, sin, position_ids, k)
    return _op.rope_qk(q, k, cos, sin, position_ids, interleaved, False, forced_backend(None))
