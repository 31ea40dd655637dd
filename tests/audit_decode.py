"""The launches of attention_kvcache in CUDA C++, recorded on CPU tensors for the audit of compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastattn
from fastattn.runtime import cuda

BF16 = torch.bfloat16


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    yield from _record(arch, BF16, 128, append=True, rope=True, num_splits=2)
    yield from _record(arch, BF16, 64, num_splits=1)
    yield from _record(arch, BF16, 256, num_splits=1)
    yield from _record(arch, BF16, 128, seqlen_q=64)
    if not everything:
        return
    for dtype in (BF16, torch.float16):
        for headdim in range(32, 257, 32):
            for seqlen_q in (1, 4, 64):
                yield from _record(arch, dtype, headdim, seqlen_q=seqlen_q, num_splits=2)
        for seqlen_q in (1, 4, 64):
            yield from _record(arch, dtype, 192, 128, seqlen_q=seqlen_q)
        for tables in (torch.float32, dtype):
            for odd in (False, True):
                yield from _record(arch, dtype, 128, append=True, rope=True, tables=tables, odd=odd)


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    found = {
        "attention_decode_kernel": ("LDGSTS.E.BYPASS.LTC128B.128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "HMMA.16816.F32"),
        "attention_combine_kernel": ("LDG.E.NA.128.CONSTANT",),
    }
    if kernel.name == "attention_append_kernel" and kernel.constants[2] == "8":
        return ("LDG.E.128.CONSTANT", "STG.E.NA.128")
    return found.get(kernel.name, ())


def _record(
    arch: int,
    dtype: torch.dtype,
    headdim: int,
    headdim_v: int | None = None,
    *,
    seqlen_q: int = 1,
    append: bool = False,
    rope: bool = False,
    tables: torch.dtype = torch.float32,
    odd: bool = False,
    num_splits: int | None = None,
) -> Iterator[cuda.Launch]:
    """odd: rows of the cache do not start at multiples of 16 bytes."""
    batch, capacity, nheads, nheads_k = 2, 4096, 64, 8
    k_cache = torch.empty(batch, capacity, nheads_k, headdim + odd, dtype=dtype)[..., :headdim]
    v_cache = torch.empty(batch, capacity, nheads_k, headdim_v or headdim, dtype=dtype)
    keywords: dict[str, Any] = {"num_splits": num_splits}
    if append:
        keywords["k"] = torch.empty(batch, seqlen_q, nheads_k, headdim, dtype=dtype)
        keywords["v"] = torch.empty(batch, seqlen_q, nheads_k, headdim_v or headdim, dtype=dtype)
    if rope:
        keywords["cos"] = keywords["sin"] = torch.empty(capacity, headdim // 2, dtype=tables)
    q = torch.empty(batch, seqlen_q, nheads, headdim, dtype=dtype)
    with cuda.recording(arch) as recorded, torch.no_grad():
        fastattn.attention_kvcache(
            q, k_cache, v_cache, torch.zeros(batch, dtype=torch.int32), backend="cuda", **keywords
        )
    yield from recorded.launches
