"""Calls of attention_kvcache for the tests of every backend. What a call must not read holds NaN in the keys and infinity
in the values."""

from __future__ import annotations

import math
from typing import Any

import law
import torch


def case(
    dtype: torch.dtype = torch.float32,
    *,
    lengths: tuple[int, ...] = (37, 11),
    seqlen_q: int = 1,
    nheads: int = 4,
    nheads_k: int = 2,
    headdim: int = 16,
    headdim_v: int | None = None,
    capacity: int = 48,
    layout: str = "contiguous",
    new: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The tensors of a call on dense caches whose unused slots are poisoned."""
    kind: dict[str, Any] = {"dtype": dtype, "layout": layout}
    headdim_v = headdim_v or headdim
    tensors = {
        "q": law.randn(len(lengths), seqlen_q, nheads, headdim, **kind, seed=seed + 1),
        "k_cache": law.randn(len(lengths), capacity, nheads_k, headdim, **kind, seed=seed + 2),
        "v_cache": law.randn(len(lengths), capacity, nheads_k, headdim_v, **kind, seed=seed + 3),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
    }
    for i, length in enumerate(lengths):
        tensors["k_cache"][i, length:] = math.nan
        tensors["v_cache"][i, length:] = math.inf
    if new:
        tensors["k"] = law.randn(len(lengths), new, nheads_k, headdim, **kind, seed=seed + 4)
        tensors["v"] = law.randn(len(lengths), new, nheads_k, headdim_v, **kind, seed=seed + 5)
    return tensors


def paged(tensors: dict[str, torch.Tensor], block_size: int) -> dict[str, torch.Tensor]:
    """The same call with the caches cut into shuffled blocks; the last one may be longer than the capacity asks for."""
    batch, capacity = tensors["k_cache"].shape[:2]
    blocks = -(-capacity // block_size)
    spare = 3
    table = torch.randperm(batch * blocks + spare)[: batch * blocks].view(batch, blocks).int()
    found = {**tensors, "block_table": table}
    for name in ("k_cache", "v_cache"):
        dense = tensors[name]
        rows = torch.full((batch, blocks * block_size, *dense.shape[2:]), math.nan, dtype=dense.dtype)
        rows[:, :capacity] = dense
        pool = torch.full((batch * blocks + spare, block_size, *dense.shape[2:]), math.nan, dtype=dense.dtype)
        pool[table.long()] = rows.view(batch, blocks, block_size, *dense.shape[2:])
        found[name] = pool
    return found


def angles(rotary_dim: int, positions: int = 48) -> dict[str, torch.Tensor]:
    angle = torch.outer(torch.arange(float(positions)), 10000 ** -(torch.arange(rotary_dim / 2) / rotary_dim))
    return {"cos": angle.cos(), "sin": angle.sin()}


def on_copies(function: Any) -> Any:
    """o, lse and the caches afterwards, so that several runs start from the same ones. Views into storage stay views."""

    def call(k_cache: torch.Tensor, v_cache: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        caches = [_copied(c) for c in (k_cache, v_cache)]
        return (*function(k_cache=caches[0], v_cache=caches[1], return_lse=True, **kwargs), *caches)

    return call


def _copied(view: torch.Tensor) -> torch.Tensor:
    """The same strides on memory of its own."""
    if view.numel() == 0:
        return view.clone()
    size = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    return view.as_strided((size,), (1,)).clone().as_strided(view.shape, view.stride())


OPTIONS: dict[str, Any] = {
    "full": lambda: {"causal": False},
    "upper_left": lambda: {"causal": "upper_left"},
    "left": lambda: {"window": (11, None)},
    "window": lambda: {"causal": False, "window": (9, 4)},
    "scale": lambda: {"scale": -0.3},
    "softcap": lambda: {"softcap": 3.0},
    "alibi": lambda: {"alibi_slopes": torch.rand(4)},
    "alibi of each": lambda: {"alibi_slopes": torch.rand(2, 4)},
    "sinks": lambda: {"sinks": law.randn(4, seed=7)},
}
