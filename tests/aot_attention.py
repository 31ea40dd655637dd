"""The launches of attention that a GPU would make, recorded on CPU tensors for compilation: every tuning row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from attention_calls import persistent

import fastattn
from fastattn.ops.attention import tuning
from fastattn.runtime import launch

BATCH, NHEADS, SEQLEN = 2, 8, 4096
RAGGED = 4001  # no tile divides it
DTYPES = {4: (torch.float32,), 2: (torch.bfloat16, torch.float16)}
SAMPLE = {
    (2, 64): ("plain", "causal"),
    (2, 128): ("plain", "causal", "padding", "dropout"),
    (4, 64): ("plain", "causal"),
}


def _options(kind: str, dtype: torch.dtype, seqlen: int) -> dict[str, dict[str, Any]]:
    """Calls that a row of this kind serves; each compiles to code of its own."""
    pairs = (seqlen, seqlen)
    kind = tuning.WIDER.get(kind, kind)
    if kind == "dense":
        return {"plain": {}, "sinks": {"sinks": torch.empty(NHEADS)}}
    if kind == "band":
        return {"causal": {"causal": True}, "upper_left": {"causal": "upper_left"}, "window": {"window": (512, 512)}}
    return {
        "padding": {"mask": torch.empty(BATCH, 1, 1, seqlen, dtype=torch.bool)},
        "mask": {"mask": torch.empty(BATCH, NHEADS, *pairs, dtype=torch.bool)},
        "bias": {"bias": torch.empty(1, NHEADS, *pairs, dtype=dtype)},
        "dropout": {"dropout_p": 0.1, "causal": True},
        "softcap": {"softcap": 30.0, "causal": True},
        "alibi": {"alibi_slopes": torch.empty(NHEADS), "causal": True},
    }


def _headdims(row: tuning.Row) -> tuple[tuple[int, int], ...]:
    """(headdim, headdim_v) that the row serves: its own, one that is split in two, and where values are narrower."""
    found = {
        32: ((32, 32),), 63: ((40, 40), (32, 32)), 64: ((64, 64), (40, 40)), 96: ((80, 80),),
        128: ((128, 128), (80, 80)), 192: ((192, 128),), 256: ((256, 256), (192, 128)), 512: ((512, 512),),
    }  # fmt: skip
    return found.get(row.headdim, ((512, 512), (576, 512)))


def launches(arch: int, *, everything: bool) -> Iterator[launch.Launch]:
    """Every row, dtype and option; without `everything` a sample of them."""
    for row in tuning.ROWS:
        if not tuning.serves(row, arch):
            continue
        names = SAMPLE.get((row.width, row.headdim), ())
        for dtype in DTYPES[row.width] if everything else DTYPES[row.width][:1]:
            for headdim, headdim_v in _headdims(row) if everything else _headdims(row)[:1]:
                for seqlen in (SEQLEN, RAGGED) if everything else (SEQLEN,):
                    for name, options in _options(row.kind, dtype, seqlen).items():
                        if everything or name in names:
                            yield from _calls(arch, dtype, headdim, headdim_v, seqlen, options)
    if everything:
        yield from _packed(arch)
        yield from _persistent(arch)


def _qkv(dtype: torch.dtype, headdim: int, headdim_v: int, nheads_k: int, *rows: int) -> tuple[torch.Tensor, ...]:
    shapes = ((NHEADS, headdim), (nheads_k, headdim), (nheads_k, headdim_v))
    return tuple(torch.empty(*rows, *shape, dtype=dtype, requires_grad=True) for shape in shapes)


def _calls(
    arch: int, dtype: torch.dtype, headdim: int, headdim_v: int, seqlen: int, options: dict[str, Any]
) -> Iterator[launch.Launch]:
    q, k, v = _qkv(dtype, headdim, headdim_v, NHEADS // 2 if seqlen == RAGGED else NHEADS, BATCH, seqlen)
    with launch.recording(arch) as recorded, fastattn.use_backend("triton"):
        o = fastattn.attention(q, k, v, **options)
        torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
        if set(options) <= {"mask", "bias"}:
            lse = torch.empty(BATCH, NHEADS, seqlen)
            fastattn.attention_weights(q.detach(), k.detach(), lse, **options)
    yield from recorded.launches


def _packed(arch: int) -> Iterator[launch.Launch]:
    """Packed sequences, and the gradients of sinks and of a bias that broadcasts over sequences and queries."""
    cu_seqlens = torch.tensor([0, 1000, 4096], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = _qkv(dtype, 128, 128, NHEADS, SEQLEN)
        for shape in ((1, NHEADS, 3096, 3096), (2, 1, 1, 3096)):
            bias = torch.empty(shape, requires_grad=True)
            sinks = torch.empty(NHEADS, requires_grad=True)
            with launch.recording(arch) as recorded, fastattn.use_backend("triton"):
                o = fastattn.attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens)
                torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
                o = fastattn.attention(q, k, v, bias=bias, sinks=sinks, cu_seqlens_q=cu_seqlens)
                torch.autograd.grad(o, (q, k, v, bias, sinks), torch.empty_like(o))
            yield from recorded.launches


def _persistent(arch: int) -> Iterator[launch.Launch]:
    """Persistent grids, which no row uses yet, of tiles that do not spill in them."""
    usual = tuning.row
    with mock.patch.object(tuning, "row", lambda *call: persistent(usual(*call))):
        found = [each for dtype in DTYPES[2] for each in _calls(arch, dtype, 64, 64, SEQLEN, {})]
    yield from found
