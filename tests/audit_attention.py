"""The launches of the attention forward in CUDA C++ that every GPU can run, recorded on CPU tensors for the audit.

On Hopper they serve what TMA cannot read: rows that do not start at multiples of 16 bytes, and expanded dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastattn
from fastattn.ops.attention import tuning_cuda
from fastattn.runtime import cuda

BATCH, NHEADS, NHEADS_K, SEQLEN = 2, 8, 4, 4096
PLACES = ("aligned", "odd")


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    """Every row of the tuning table for this GPU, in both dtypes; without `everything` some of them."""
    widths = [(r.headdim, r.headdim_v) for r in tuning_cuda.ROWS if r.kind == "band"]
    for headdim, headdim_v in dict.fromkeys(widths):
        for kind in tuning_cuda.KINDS:
            for dtype in (torch.bfloat16, torch.float16):
                for place in PLACES:
                    sample = dtype == torch.bfloat16 and headdim in (64, 128, 256) and place == "aligned"
                    if everything or (sample and (kind == "band" or headdim == 128)):
                        yield from _call(arch, headdim, headdim_v, kind, dtype, place)


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    found = ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "MUFU.EX2")
    aligned = kernel.constants[8] == "true"
    return (*found, "LDGSTS.E.BYPASS.LTC128B.128") if aligned else found


def _call(arch: int, headdim: int, headdim_v: int, kind: str, dtype: torch.dtype, place: str) -> Iterator[cuda.Launch]:
    options: dict[str, Any] = {"softcap": 30.0} if kind != "band" else {}
    if kind == "dropout":
        options["dropout_p"] = 0.1
    q, k, v = (
        torch.empty(BATCH, SEQLEN, heads, width + (place == "odd"), dtype=dtype)[..., :width]
        for heads, width in ((NHEADS, headdim), (NHEADS_K, headdim), (NHEADS_K, headdim_v))
    )
    with cuda.recording(arch) as recorded, cuda.portable():
        fastattn.attention(q, k, v, causal=True, backend="cuda", **options)
    yield from recorded.launches
