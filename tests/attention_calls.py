"""Small calls of attention for the tests of GPU kernels: q, k, v and every option by name, made for tiles of a given size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import law
import torch

from fastattn.ops.attention import tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NHEADS = 2
Tensors = dict[str, torch.Tensor]


def persistent(row: tuning.Row) -> tuning.Row:
    """The same tiles in grids of one program per multiprocessor."""
    fwd, dq, dkdv = (tile._replace(RESIDENT=1) for tile in (row.fwd, row.dq, row.dkdv))
    return row._replace(fwd=fwd, dq=dq, dkdv=dkdv)


@dataclass(frozen=True)
class Calls:
    """tile: of so many keys, and queries, one is hidden by the mask. window: the band of the option of that name."""

    seqlen_q: int
    seqlen_k: int
    headdim: int
    dtype: torch.dtype
    tile: int
    window: tuple[int, int]

    def qkv(
        self,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        headdim: int | None = None,
        headdim_v: int | None = None,
        *,
        batch: int = 1,
        nheads: int = NHEADS,
        nheads_k: int = 1,
        dtype: torch.dtype | None = None,
        layout: str = "contiguous",
    ) -> Tensors:
        kind: dict[str, Any] = {"dtype": dtype or self.dtype, "layout": layout, "device": DEVICE}
        seqlen_q = self.seqlen_q if seqlen_q is None else seqlen_q
        seqlen_k = self.seqlen_k if seqlen_k is None else seqlen_k
        headdim = headdim or self.headdim
        return {
            "q": law.randn(batch, seqlen_q, nheads, headdim, **kind, seed=1),
            "k": law.randn(batch, seqlen_k, nheads_k, headdim, **kind, seed=2),
            "v": law.randn(batch, seqlen_k, nheads_k, headdim_v or headdim, **kind, seed=3),
        }

    def mask(self) -> torch.Tensor:
        """Empty rows, empty tiles, and single pairs."""
        mask = torch.rand(1, NHEADS, self.seqlen_q, self.seqlen_k) < 0.5
        mask[:, :, 4:7] = False
        second = slice(self.tile, 2 * self.tile)
        mask[:, 0, :, second], mask[:, 1, second, : self.tile] = False, False
        return mask.to(DEVICE)

    def bias(self) -> torch.Tensor:
        bias = law.randn(1, NHEADS, self.seqlen_q, self.seqlen_k, seed=4)
        return bias.masked_fill(torch.rand(bias.shape) < 0.1, -math.inf).to(DEVICE)

    @property
    def options(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """By name: what makes the tensors that get a gradient, and the other keywords; what is callable is to be called."""
        return {
            "causal": ({}, {"causal": True}),
            "window": ({}, {"window": self.window, "causal": "upper_left"}),
            "scale": ({}, {"scale": -0.4}),
            "softcap": ({}, {"softcap": 1.5}),
            "mask": ({}, {"mask": self.mask}),
            "bias": ({"bias": self.bias}, {}),
            "shared_bias": ({"bias": lambda: law.randn(NHEADS, 1, self.seqlen_k, seed=4).to(DEVICE)}, {}),
            "alibi": ({"alibi_slopes": lambda: torch.rand(1, NHEADS).to(DEVICE)}, {}),
            "sinks": ({"sinks": lambda: law.randn(NHEADS, seed=5).to(DEVICE)}, {}),
            "dropout": ({}, {"dropout_p": 0.3}),
        }

    def with_options(self, *names: str, **kind: Any) -> tuple[Tensors, dict[str, Any], tuple[str, ...]]:
        """Tensors, keywords, and the names of the tensors that get a gradient."""
        tensors, keywords = self.qkv(**kind), {}
        for name in names:
            more, settings = self.options[name]
            tensors.update({n: make() for n, make in more.items()})
            keywords.update({n: x() if callable(x) else x for n, x in settings.items()})
        return tensors, keywords, tuple(n for n in tensors if n != "alibi_slopes")
