"""Attention on a GPU: the grid of the field's papers (16k tokens, nheads · headdim = 2048), masks, and decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import fastattn
from fastattn.ops.attention import reference

from ..attention import Sample
from ..case import DTYPES, OURS, Case, Contender, Prepared, Problem
from ..law import Results
from ..shapes import AttentionShape, square
from . import rivals

Tensor = torch.Tensor
Rival = Callable[[], Callable[[], Tensor]]
TOKENS, WIDTH = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
HEADDIMS = (64, 128, 256)


def grid(quick: bool) -> list[AttentionShape]:
    seqlens, headdims = (SEQLENS[1::3], HEADDIMS[:2]) if quick else (SEQLENS, HEADDIMS)
    return [
        square(TOKENS // n, WIDTH // d, n, d, causal=causal)
        for d in headdims
        for causal in (False, True)
        for n in seqlens
    ]


_RAGGED = (4096, 37, 2048, 1024, 512, 3000, 1667, 4000)
MASKED = {
    "padding mask": [square(8, 16, 2048, 128, lengths=(2048, 1900, 1500, 1200, 1024, 900, 600, 300))],
    "additive bias": [square(4, 16, 2048, 64, bias="heads")],
    "window": [square(2, 16, 8192, 128, causal=True, window=1023)],
    "prefill": [square(1, 32, 8192, 128, nheads_k=8, causal=True)],
    "packed": [square(1, 16, sum(_RAGGED), 128, lengths=_RAGGED, packed=True, causal=c) for c in (False, True)],
    "head dims": [square(8, 16, 2048, d, causal=True) for d in (40, 80, 96, 192)],
}
DECODE = [
    AttentionShape(batch, 32, 1, seqlen, 128, nheads_k=8)
    for batch, seqlen in ((1, 8192), (1, 65536), (16, 4096), (64, 8192), (128, 2048))
]


def cases(part: str, device: torch.device, quick: bool = False) -> list[Case]:
    """part: forward, backward, masked or decode."""
    if part == "decode":
        return [_case("decode", s, "bf16", _decode, "copy", device) for s in (DECODE[:2] if quick else DECODE)]
    if part == "masked":
        rows = [(row, shape) for row, shapes in MASKED.items() for shape in shapes]
        return [_case(row, shape, "bf16", _forward, "flops", device) for row, shape in rows]
    build = _forward if part == "forward" else _backward
    return [
        _case(f"{part} {'causal' if s.causal else 'dense'}", s, "bf16", build, "flops", device) for s in grid(quick)
    ]


def _case(row: str, shape: AttentionShape, dtype: str, build: Any, bound: str, device: torch.device) -> Case:
    if bound == "copy":
        work: int = shape.kv_bytes(DTYPES[dtype].itemsize)
    else:
        work = shape.backward_flops() if build is _backward else shape.forward_flops()
    return Case("attention", row, shape.label, dtype, bound, work, partial(build, row, shape, DTYPES[dtype], device))


def tensors(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, seqlen, heads, headdim], contiguous; the same numbers on every run."""
    g = torch.Generator(device).manual_seed(0)
    sizes = [(shape.seqlen_q, shape.nheads), (shape.seqlen_k, shape.kv_heads), (shape.seqlen_k, shape.kv_heads)]
    q, k, v = (torch.randn(shape.batch, n, h, shape.headdim, generator=g, device=device).to(dtype) for n, h in sizes)
    return q, k, v


def _ours(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Callable[[], Tensor]:
    options: dict[str, Any] = {"causal": shape.causal, **extra}
    if shape.window is not None:
        options["window"] = (shape.window, 0)
    if shape.packed:
        longest = max(shape.lengths)
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return lambda: fastattn.attention(q[0], k[0], v[0], **options)[None]
    return lambda: fastattn.attention(q, k, v, **options)


def _forward(row: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Problem:
    q, k, v = tensors(shape, dtype, device)
    bias = bounds = sequence = extra = None
    ours: dict[str, Any] = {}
    if shape.bias:
        g = torch.Generator(device).manual_seed(1)
        size = (1, shape.nheads, shape.seqlen_q, shape.seqlen_k)
        bias = extra = torch.randn(size, generator=g, device=device).to(dtype)
        ours["bias"] = bias
    elif shape.packed:
        bounds = torch.tensor((0, *shape.lengths), device=device).cumsum(0).int()
        sequence = torch.repeat_interleave(torch.tensor(shape.lengths, device=device))
        ours["cu_seqlens_q"] = bounds
    elif shape.lengths:
        extra = shape.visible(torch.zeros(1, dtype=torch.long)).to(device)
        ours["mask"] = extra
    elif shape.window is not None:
        extra = shape.visible(torch.arange(shape.seqlen_q)).to(device)
    ways: dict[str, Rival] = {OURS: lambda: _ours(shape, q, k, v, **ours)}
    if shape.packed:
        ways["torch varlen"] = lambda: rivals.varlen(shape, q, k, v, bounds)  # type: ignore[arg-type]
    else:
        ways |= {name: partial(rivals.sdpa, name, shape, q, k, v, extra) for name in rivals.BACKENDS}
    if not (shape.bias or shape.lengths or shape.window):
        ways["FlashAttention 4"] = lambda: rivals.flash_attention_4(shape, q, k, v)
    if row in ("padding mask", "additive bias", "window", "prefill", "packed"):
        ways["Flex"] = lambda: rivals.flex(shape, q, k, v, bias, sequence)
    return _without_gradients(shape, q, k, v, bias, ways)


def _without_gradients(
    shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ways: dict[str, Rival]
) -> Problem:
    sample = Sample(shape)
    truth, plain = sample.law(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
    contenders = [_contender(name, way, lambda o: sample.output(o.transpose(1, 2))) for name, way in ways.items()]
    return Problem(truth, plain, contenders)


def _contender(name: str, way: Rival, results: Callable[[Any], Results]) -> Contender:
    def prepare() -> Prepared:
        call = way()

        def without_grad() -> Tensor:
            with torch.no_grad():
                return call()

        return Prepared(without_grad, results)

    return Contender(name, prepare)


def _backward(row: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Problem:
    """dq, dk, dv alone: the forward is done once and its graph kept. The gradients of a head depend on that head only."""
    q, k, v = (x.requires_grad_() for x in tensors(shape, dtype, device))
    do = torch.randn(q.shape, generator=torch.Generator(device).manual_seed(2), device=device).to(dtype)
    one = replace(shape, batch=1, nheads=1, nheads_k=0)

    def pick(gradients: tuple[Tensor, ...]) -> Results:
        return {name: g[-1:, :, -1:].detach() for name, g in zip(("dq", "dk", "dv"), gradients, strict=True)}

    def law(dtype: torch.dtype) -> Results:
        parts = [x.detach()[-1:, :, -1:].to(dtype).requires_grad_() for x in (q, k, v)]
        o = reference.attention(*parts, causal=one.causal)
        gradients = torch.autograd.grad(o, parts, do[-1:, :, -1:].to(dtype))  # type: ignore[arg-type]
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    ways: dict[str, Rival] = {OURS: lambda: _ours(shape, q, k, v)}
    ways |= {name: partial(rivals.sdpa, name, shape, q, k, v, None) for name in rivals.BACKENDS}
    ways["FlashAttention 4"] = lambda: rivals.flash_attention_4(shape, q, k, v)

    def contender(name: str, way: Rival) -> Contender:
        def prepare() -> Prepared:
            o = way()()
            return Prepared(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), pick)

        return Contender(name, prepare)

    return Problem(law(torch.float64), law(dtype), [contender(name, way) for name, way in ways.items()])


def _decode(row: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Problem:
    """One new token against a full cache."""
    q, k, v = tensors(shape, dtype, device)
    seqlens = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32, device=device)
    ways: dict[str, Rival] = {OURS: lambda: lambda: fastattn.attention_kvcache(q, k, v, seqlens)}
    ways |= {name: partial(rivals.sdpa, name, shape, q, k, v, None) for name in rivals.BACKENDS}
    ways["FlashInfer"] = lambda: rivals.flashinfer_decode(shape, q, k, v)
    return _without_gradients(shape, q, k, v, None, ways)
