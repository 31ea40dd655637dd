"""The launches of the Hopper attention backward, recorded on CPU tensors for the audit: every row of its table, and those that are
persistent or apart, which a GPU is to choose from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastattn.ops.attention import attention, tuning_sm90_bwd
from fastattn.runtime import cuda

ARCHS = (90,)
SEQLEN = 512
BF16 = torch.bfloat16


def _options(kind: str) -> tuple[dict[str, Any], ...]:
    mask, bias = torch.ones(1, 1, 1, SEQLEN, dtype=torch.bool), torch.zeros(1, 1, 1, SEQLEN)
    masked = {"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}
    pairs = {"softcap": 30.0}, {"dropout_p": 0.1}, {"mask": mask, "bias": bias, "softcap": 30.0, "dropout_p": 0.1}
    return {"plain": ({"causal": True},), "masked": masked, "pairs": pairs}[kind]


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    for row in tuning_sm90_bwd.ROWS:
        if everything or row.kind == "plain":
            for options in _options(row.kind):
                for dtype in (BF16, torch.float16) if everything else (BF16,):
                    yield from _call(arch, row, dtype, options)
        if everything and row.kind == "plain":
            for other in tuning_sm90_bwd.candidates(row.headdim, row.headdim_v, row.kind):
                if other.ways & {"persistent", "apart"}:
                    with tuning_sm90_bwd.tried(other):
                        yield from _call(arch, other, BF16, {"causal": True})


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    if kernel.name == "attention_bwd_sm90_dq_kernel":
        return ("LDG.E.NA.128.CONSTANT", "STG.E.128")
    dtype = {"bf16": ".BF16", "f16": ""}[kernel.constants[0]]
    headdim, headdim_v, block_m, block_n = (int(c) for c in kernel.constants[1:5])
    if block_n == 96:  # s and dP, dk, dv, dq
        columns: tuple[int, ...] = 32, 96, 96 if headdim_v == headdim else 32, 64
    else:
        wide = 2 if block_n == 64 else 1
        columns = block_m // wide, headdim // wide, headdim_v // wide, headdim * block_m // 128
    products = tuple(f"HGMMA.64x{n}x16.F32{dtype}" for n in columns)
    return (*products, "UTMALDG.4D", "UBLKRED.G.S.ADD.F32.RN", "SYNCS", "STSM.16.M88.4", "MUFU.EX2", "USETMAXREG")


def _call(arch: int, row: tuning_sm90_bwd.Row, dtype: torch.dtype, options: dict[str, Any]) -> Iterator[cuda.Launch]:
    q = torch.empty(1, SEQLEN, 4, row.headdim, dtype=dtype, requires_grad=True)
    k, v = (torch.empty(1, SEQLEN, 2, width, dtype=dtype) for width in (row.headdim, row.headdim_v))
    with cuda.recording(arch) as recorded:
        o = attention(q, k, v, backend="cuda", **options)
        torch.autograd.grad(o, q, torch.empty_like(o))
    yield from (launch for launch in recorded.launches if "bwd_sm90" in launch.kernel.name)
