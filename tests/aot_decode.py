"""The launches of attention_kvcache that a GPU would make, recorded on CPU tensors for compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastattn
from fastattn.runtime import launch

BF16 = torch.bfloat16


def launches(arch: int, *, everything: bool) -> Iterator[launch.Launch]:
    yield from _record(arch, BF16, 128, append=True, rope=True, block_size=256)
    yield from _record(arch, BF16, 64, append=True, interleaved=True)
    yield from _record(arch, BF16, 576, 512, nheads=128, nheads_k=1, block_size=64, one_storage=True)
    yield from _record(arch, torch.float32, 128, append=True)
    yield from _record(arch, BF16, 40, seqlen_q=4, options=True)
    yield from _record(arch, BF16, 128, seqlen_q=64, block_size=16)
    if not everything:
        return
    for dtype in (BF16, torch.float16, torch.float32):
        for headdim in (16, 40, 64, 80, 96, 128, 192, 256, 512):
            for seqlen_q in (1, 4, 256):
                yield from _record(arch, dtype, headdim, seqlen_q=seqlen_q)
                yield from _record(arch, dtype, headdim, seqlen_q=seqlen_q, block_size=16)
            yield from _record(arch, dtype, headdim, append=True, rope=True, interleaved=True, num_splits=1)
        for seqlen_q in (1, 2):
            for nheads in (16, 128):
                heads = {"nheads": nheads, "nheads_k": 1, "seqlen_q": seqlen_q}
                yield from _record(arch, dtype, 576, 512, **heads, block_size=64, one_storage=True)
                yield from _record(arch, dtype, 576, 512, **heads)
        for headdim in (64, 128, 576):
            for seqlen_q in (1, 4, 64):
                yield from _record(arch, dtype, headdim, min(headdim, 512), seqlen_q=seqlen_q, options=True)
        yield from _record(arch, dtype, 192, 128, append=True, block_size=7)
        for headdim in (13, 250, 500):
            for seqlen_q in (1, 4):
                yield from _record(arch, dtype, headdim, seqlen_q=seqlen_q, block_size=7)


def _record(
    arch: int,
    dtype: torch.dtype,
    headdim: int,
    headdim_v: int | None = None,
    *,
    nheads: int = 64,
    nheads_k: int = 8,
    seqlen_q: int = 1,
    append: bool = False,
    rope: bool = False,
    interleaved: bool = False,
    block_size: int | None = None,
    one_storage: bool = False,
    options: bool = False,
    num_splits: int | None = None,
) -> Iterator[launch.Launch]:
    batch, capacity, headdim_v = 2, 4096, headdim_v or headdim
    new = {"dtype": dtype, "device": "cpu"}
    sizes = (batch, capacity) if block_size is None else (64, block_size)
    k_cache = torch.empty(*sizes, nheads_k, headdim, **new)
    v_cache = k_cache[..., :headdim_v] if one_storage else torch.empty(*sizes, nheads_k, headdim_v, **new)
    keywords: dict[str, Any] = {"interleaved": interleaved, "num_splits": num_splits}
    if block_size is not None:
        pages = torch.arange(
            batch * (capacity // block_size), dtype=torch.int32
        )  # appended keys have slots of their own
        keywords["block_table"] = pages.view(batch, -1) % 64
    if append:
        keywords["k"] = torch.empty(batch, seqlen_q, nheads_k, headdim, **new)
        keywords["v"] = torch.empty(batch, seqlen_q, nheads_k, headdim_v, **new)
    if rope or interleaved:
        keywords["cos"] = keywords["sin"] = torch.empty(capacity, min(headdim, 128) // 2)
    if options:
        keywords.update(window=(512, None), softcap=30.0, alibi_slopes=torch.empty(nheads), sinks=torch.empty(nheads))
    lengths = torch.zeros(batch, dtype=torch.int32)
    q = torch.empty(batch, seqlen_q, nheads, headdim, **new)
    with launch.recording(arch) as recorded:
        fastattn.attention_kvcache(q, k_cache, v_cache, lengths, backend="triton", **keywords)
    yield from recorded.launches
