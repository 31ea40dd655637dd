"""Small calls of scaled_dot_product_attention, in torch's layout."""

from __future__ import annotations

import law
import torch


def qkv(
    seqlen_q: int = 33,
    seqlen_k: int = 33,
    nheads_k: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str = "bhsd",
) -> dict[str, torch.Tensor]:
    """q, k, v in torch's layout; bshd: views of memory in ours."""
    found = {}
    for i, (name, seqlen, heads) in enumerate(
        (("q", seqlen_q, 4), ("k", seqlen_k, nheads_k), ("v", seqlen_k, nheads_k))
    ):
        t = law.randn(2, heads, seqlen, 16, dtype=dtype, seed=i)
        found[name] = t.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bshd" else t
    return found
