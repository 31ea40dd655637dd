"""What GPU kernels want to know of a call's tensors: strides without shapes, edges without None, dropout as words."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops.attention import _philox

Tensor = torch.Tensor
SMALLEST_SCALE = 2.0**-126  # of float32: below, a folded scale is 0, and 0 times the -inf of a hidden key is NaN


def strides(t: Tensor) -> tuple[int, int, int]:
    """Strides over batch, seqlen and head."""
    s = t.stride()
    return (s[0], s[1], s[2]) if len(s) == 4 else (0, s[0], s[1])


def pair_strides(t: Tensor | None) -> tuple[int, ...]:
    """Strides over batch, head, query and key of a mask or bias; 0 where it broadcasts, and without one."""
    if t is None:
        return 0, 0, 0, 0
    found = [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return (*(0,) * (4 - len(found)), *found)


def slopes_stride(alibi_slopes: Tensor | None) -> int:
    """The stride over batch; 0 where it broadcasts, and without slopes."""
    return 0 if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes.stride(0)


def is_float(t: Tensor | None) -> int:
    """1: float, 0: the type of q, or absent."""
    return int(t is not None and t.dtype is torch.float32)


def edge(side: int | None, spec: Any) -> int | None:
    """A window no wider than the scores, so that adding to it does not overflow 32 bits."""
    return None if side is None else min(side, spec.seqlen_q + spec.seqlen_k)


def edges(spec: Any) -> tuple[int, int]:
    """left and right as numbers: an unbounded side sees everything."""
    everything = spec.seqlen_q + spec.seqlen_k
    return (
        everything if spec.left is None else min(spec.left, everything),
        everything if spec.right is None else min(spec.right, everything),
    )


def dropout(spec: Any) -> tuple[int, float]:
    """threshold, 1 / (1 - dropout_p)."""
    return _philox.threshold(spec.dropout_p), 1.0 / (1.0 - spec.dropout_p)
