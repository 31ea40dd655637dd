"""The launches of attention's backward for every GPU, recorded on CPU tensors for the audit of compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastattn.ops.attention import attention, tuning_cuda_bwd
from fastattn.runtime import cuda

BF16 = torch.bfloat16
NHEADS, NHEADS_K, SEQLEN = 8, 2, 512
HEADS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    yield from _record(arch, BF16, 128, 128, causal=True)
    yield from _record(arch, BF16, 64, 64, bias=True, sinks=True)
    if not everything:
        return
    for dtype in (BF16, torch.float16):
        for headdim, headdim_v in HEADS:
            for odd in (False, True):
                yield from _record(arch, dtype, headdim, headdim_v, odd=odd, causal=True)
                yield from _record(arch, dtype, headdim, headdim_v, odd=odd, bias=True, sinks=True)
    for headdim, headdim_v in HEADS:  # what a GPU is to time against it
        for pairs in (False, True):
            row = next(r for r in tuning_cuda_bwd.candidates(arch, headdim, pairs) if not r.adds_dq)
            with tuning_cuda_bwd.tried(row):
                yield from _record(arch, BF16, headdim, headdim_v, bias=pairs, causal=not pairs)


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    if kernel.name == "attention_bwd_delta_kernel":
        return ("LDG.E.NA.128.CONSTANT",) if "true" in kernel.constants else ()
    if kernel.name == "attention_bwd_dsinks_kernel":
        return ("MUFU.EX2",)
    if kernel.name == "attention_bwd_dq_sums_kernel":
        return ("LDS.128", "STG.E.128")
    found: tuple[str, ...] = ("HMMA.16816.F32", "LDSM.16.M88.4")
    flags = kernel.constants[-3:]  # aligned is the last one of dbias, the second last of dq, the third last of dkdv
    aligned = flags[{"attention_bwd_dbias_kernel": 2, "attention_bwd_dq_kernel": 1}.get(kernel.name, 0)]
    if kernel.name != "attention_bwd_dbias_kernel":
        found += ("LDSM.16.MT88.4",)
    if aligned == "true":
        found += ("LDGSTS.E.BYPASS.LTC128B.128",)
    if kernel.name == "attention_bwd_dkdv_kernel" and flags[2] == "true":
        found += (f"{'REDG' if arch >= 90 else 'RED'}.E.ADD.F32.FTZ.RN.STRONG.GPU",)
    return found


def _record(
    arch: int,
    dtype: torch.dtype,
    headdim: int,
    headdim_v: int,
    *,
    odd: bool = False,
    bias: bool = False,
    sinks: bool = False,
    **options: Any,
) -> Iterator[cuda.Launch]:
    """odd: rows of k do not start at multiples of 16 bytes; bias: one of all heads, with its gradient."""
    q = torch.empty(1, SEQLEN, NHEADS, headdim, dtype=dtype, requires_grad=True)
    k = torch.empty(1, SEQLEN, NHEADS_K, headdim + odd, dtype=dtype)[..., :headdim]
    v = torch.empty(1, SEQLEN, NHEADS_K, headdim_v, dtype=dtype)
    if bias:
        options["bias"] = torch.empty(SEQLEN, SEQLEN, dtype=dtype, requires_grad=True)
    if sinks:
        options["sinks"] = torch.empty(NHEADS, requires_grad=True)
    with cuda.recording(arch) as recorded, cuda.portable():
        attention(q, k, v, backend="cuda", **options).sum().backward()
    for launch in recorded.launches:
        if launch.kernel.file.startswith("attention_bwd"):
            yield launch
