"""The launches of the Hopper attention forward, recorded on CPU tensors for the audit: every row of its tuning table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastattn
from fastattn.ops.attention import tuning_sm90
from fastattn.runtime import cuda

ARCHS = (90,)
SEQLEN = 2048
MASK = torch.ones(1, 1, 1, SEQLEN, dtype=torch.bool)
# A bias that TMA reads in rows, in tiles, and one that it cannot read; in bfloat16 it stands for q's dtype.
ROW, SQUARE, ODD = torch.zeros(SEQLEN), torch.zeros(SEQLEN, SEQLEN), torch.zeros(SEQLEN, SEQLEN + 1)[:, :SEQLEN]
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "dense": ({},),
    "band": ({"causal": True},),
    "general": ({"softcap": 30.0},),
    "pairs": ({"mask": MASK}, {"dropout_p": 0.1}, {"mask": MASK, "dropout_p": 0.1, "softcap": 30.0}),
    "bias": ({"bias": SQUARE}, {"bias": SQUARE.bfloat16()}, {"bias": ROW}, {"bias": ODD}),
    "mixed": (
        {"bias": SQUARE, "mask": MASK, "dropout_p": 0.1, "softcap": 30.0},
        {"bias": SQUARE.bfloat16(), "dropout_p": 0.1},
        {"bias": ODD, "mask": MASK, "dropout_p": 0.1},
    ),
    "short": ({}, {"softcap": 30.0}),
}


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    for headdim, headdim_v in tuning_sm90.HEADS:
        for kind, options in OPTIONS.items():
            for dtype in (torch.bfloat16, torch.float16):
                sample = dtype == torch.bfloat16 and headdim == headdim_v and headdim % 64 == 0
                if everything or sample:
                    for given in options if everything else options[:1]:
                        yield from _call(arch, headdim, headdim_v, kind, dtype, given)
    if everything:
        total, cu_seqlens = 3 * SEQLEN, torch.arange(4, dtype=torch.int32) * SEQLEN
        for headdim, headdim_v in tuning_sm90.HEADS:
            q, k, v = (torch.empty(total, 2, width, dtype=torch.bfloat16) for width in (headdim, headdim, headdim_v))
            with cuda.recording(arch) as recorded:
                fastattn.attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens, backend="cuda")
            yield from recorded.launches


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    dtype = {"bf16": ".BF16", "f16": ""}[kernel.constants[0]]
    headdim_v, block_n = kernel.constants[2], kernel.constants[4]
    products = tuple(f"HGMMA.64x{n}x16.F32{dtype}" for n in (block_n, headdim_v))
    return (*products, "UTMALDG.4D", "UTMASTG.4D", "SYNCS", "STSM.16.M88.4", "MUFU.EX2", "USETMAXREG")


def _call(
    arch: int, headdim: int, headdim_v: int, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> Iterator[cuda.Launch]:
    seqlen_q = 64 if kind == "short" else SEQLEN
    q = torch.empty(1, seqlen_q, 4, headdim, dtype=dtype)
    k, v = (torch.empty(1, SEQLEN, 2, width, dtype=dtype) for width in (headdim, headdim_v))
    given = {name: x.to(dtype) if name == "bias" and x.dtype == torch.bfloat16 else x for name, x in options.items()}
    with cuda.recording(arch) as recorded:
        fastattn.attention(q, k, v, backend="cuda", **given)
    yield from recorded.launches
