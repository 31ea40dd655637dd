"""What the Hopper forward and backward of the backend `cuda` have in common: TMA, and flags as template arguments."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops.attention._cuda_layout import Ints, Layout, row_sizes, rows_aligned

L2_BYTES = 32 << 20  # of the 50 MB: the rest is for what is read once and what else runs
PANEL = 64  # columns of a box: 128 bytes, the span of its swizzle
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}

# All of a cuda.TensorMap but its tensor.
Box = tuple[Ints, Ints, Ints, int]


def reachable(spec: Any, layout: Layout, of_q: tuple[Ints, ...], of_k: tuple[Ints, ...]) -> bool:
    """Does TMA reach tensors with the rows of q and of k, of such strides? It wants rows at multiples of 16 bytes, no
    dimension expanded, and something to copy."""
    rows_q, rows_k = row_sizes(spec, layout)
    if not layout.aligned or 0 in rows_q or 0 in rows_k:
        return False
    tensors = (*((rows_q, strides) for strides in of_q), *((rows_k, strides) for strides in of_k))
    return all(
        rows_aligned(sizes, strides)
        and all(size == 1 or stride > 0 for size, stride in zip(sizes, strides, strict=False))
        for sizes, strides in tensors
    )


def box(sizes: Ints, headdim: int, strides: Ints, rows: int) -> Box:
    """(headdim, seqlen, heads, batch) in boxes of so many rows and one panel of columns. sizes: without columns."""
    *batch, seqlen, heads = sizes
    *over_batch, over_rows, over_heads, _ = strides
    listed = (headdim, seqlen, heads, batch[0] if batch else 1)
    # a dimension with one entry may have any stride; TMA wants a multiple of 16 bytes
    steps = zip(listed[1:], (over_rows, over_heads, over_batch[0] if batch else 0), strict=True)
    return listed, tuple(8 if size == 1 else step for size, step in steps), (PANEL, rows, 1, 1), 128


def flags(*wanted: tuple[str, Any]) -> str:
    """The names of what holds, as C++ joins them."""
    return " | ".join(name for name, holds in wanted if holds) or "0"
