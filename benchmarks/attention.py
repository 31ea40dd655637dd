"""Attention against SDPA, plain products, FlexAttention and ONNX Runtime: forward, backward, decoding, every mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import fastattn
from fastattn.ops.attention import reference

from . import ort, rivals, shapes
from .case import OURS, AbsentError, Case, Contender, Prepared, Problem
from .law import Results
from .shapes import AttentionShape

Tensor = torch.Tensor
Rival = Callable[[], Callable[[], Tensor]]


def cases(quick: bool = False) -> list[Case]:
    """Every row of attention; `quick` keeps one or two shapes per row."""
    some = (lambda rows: rows[:1]) if quick else (lambda rows: rows)
    found = [
        *_rows("forward dense", some(shapes.FORWARD)),
        *_rows("forward causal", some(shapes.CAUSAL)),
        *_rows("short", some(shapes.SHORT)),
        *_rows("decode", some(shapes.DECODE), build=_decode, bound="read"),
        *_rows("padding mask", shapes.PADDING),
        *_rows("additive bias", some(shapes.BIAS)),
        *_rows("backward", some(shapes.BACKWARD), build=_backward),
        *_rows("packed", some(shapes.PACKED)),
    ]
    if quick:
        quick_window = [replace(shape, seqlen_q=2048, seqlen_k=2048) for shape in shapes.WINDOW]
        return found + _rows("window", quick_window) + _sweep("seqlen", shapes.SEQLENS[:5], lambda s: s.seqlen_q)
    for row in ("forward dense", "forward causal"):
        found += _rows(row, [c for c in (shapes.FORWARD if "dense" in row else shapes.CAUSAL)[:1]], dtypes=("fp16",))
    found += _rows("window", shapes.WINDOW)
    found += _rows("prefill", shapes.PREFILL)
    found += _rows("head dims", shapes.HEADDIMS)
    found += _rows("strided", shapes.STRIDED)
    found += _sweep("seqlen", shapes.SEQLENS, lambda s: s.seqlen_q)
    found += _sweep("batch", shapes.BATCHES, lambda s: s.batch)
    threads = sorted({1, 2, torch.get_num_threads()} & set(range(1, torch.get_num_threads() + 1)))
    for n in threads:
        found += [replace(c, threads=n, x=n) for c in _sweep("threads", [shapes.THREADS], lambda s: 0)]
    return found


def _rows(
    row: str,
    todo: Iterable[AttentionShape],
    build: Any = None,
    bound: str = "flops",
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
) -> list[Case]:
    return [_case(row, shape, dtype, build or _forward, bound) for shape in todo for dtype in dtypes]


def _case(row: str, shape: AttentionShape, dtype: str, build: Any, bound: str) -> Case:
    if bound == "read":
        work = shape.kv_bytes(4 if dtype == "fp32" else 2)
    else:
        work = shape.backward_flops() if build is _backward else shape.forward_flops()
    return Case("attention", row, shape.label, dtype, bound, work, partial(build, row, shape, dtype))


def _sweep(axis: str, todo: Iterable[AttentionShape], x: Callable[[AttentionShape], int]) -> list[Case]:
    """Rows that are plotted: the rivals are those that stay the same along the axis."""
    return [
        replace(_case(f"over {axis}", shape, dtype, _forward, "flops"), axis=axis, x=x(shape))
        for shape in todo
        for dtype in ("fp32", "bf16")
    ]


# building a problem


def tensors(shape: AttentionShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views [batch, heads, seqlen, headdim] in the shape's memory layout; the same numbers on every run."""
    g = torch.Generator().manual_seed(0)
    b, h, hk, sq, sk, d = shape.batch, shape.nheads, shape.kv_heads, shape.seqlen_q, shape.seqlen_k, shape.headdim
    if shape.layout == "qkv":  # one projection: [batch, seqlen, 3, heads, headdim]
        qkv = torch.randn(b, sq, 3, h, d, generator=g).to(dtype)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return q, k, v
    if shape.layout == "bshd":
        sizes = [(b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d)]
        q, k, v = (torch.randn(s, generator=g).to(dtype).transpose(1, 2) for s in sizes)
        return q, k, v
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in [(b, h, sq, d), (b, hk, sk, d), (b, hk, sk, d)])
    return q, k, v


def bias_for(shape: AttentionShape, dtype: torch.dtype) -> Tensor | None:
    if not shape.bias:
        return None
    batch = 1 if shape.bias == "heads" else shape.batch
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, shape.nheads, shape.seqlen_q, shape.seqlen_k, generator=g).to(dtype)


class Sample:
    """The part of a result that is compared with float64: some batch entries, heads and query rows of each.

    The truth of a 4096-token prefill costs more than all measurements together; a row of attention depends on no other.
    """

    def __init__(self, shape: AttentionShape, rows: int = 128) -> None:
        self.shape = shape
        group = shape.nheads // shape.kv_heads
        self.batch = sorted({0, shape.batch // 2, shape.batch - 1})
        self.heads_k = sorted({0, shape.kv_heads - 1})
        self.heads = [hk * group + i for hk in self.heads_k for i in range(group)]
        count = min(rows, shape.seqlen_q)
        self.rows = torch.linspace(0, shape.seqlen_q - 1, count).round().long().unique()

    def query(self, x: Tensor) -> Tensor:
        return x[self.batch][:, self.heads][:, :, self.rows]

    def key(self, x: Tensor) -> Tensor:
        return x[self.batch][:, self.heads_k]

    def output(self, o: Tensor) -> Results:
        return {"o": self.query(o.detach())}

    def law(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Results, Results]:
        """Truth and plain result of the sample, through the room's reference."""
        seen = self.shape.visible(self.rows).to(q.device)
        seen = seen[self.batch] if seen.shape[0] > 1 else seen
        if bias is not None:
            bias = bias[self.batch if bias.shape[0] > 1 else [0]][:, self.heads][:, :, self.rows]
        part = [self.query(q), self.key(k), self.key(v)]

        def attend(dtype: torch.dtype) -> Results:
            q_, k_, v_ = (x.to(dtype).transpose(1, 2) for x in part)
            bias_ = None if bias is None else bias.to(dtype)
            o = reference.attention(q_, k_, v_, mask=seen, bias=bias_)
            assert isinstance(o, Tensor)
            return {"o": o.transpose(1, 2)}

        return attend(torch.float64), attend(q.dtype)


def _fastattn(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """Our call on views of the rivals' memory. Its result is seen as theirs: [batch, heads, seqlen, headdim]."""
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"causal": shape.causal}
    if shape.window is not None:
        options["window"] = (shape.window, 0)
    if bias is not None:
        options["bias"] = bias
    if shape.packed:
        bounds = torch.tensor((0, *shape.lengths)).cumsum(0).int()
        options |= {"cu_seqlens_q": bounds, "max_seqlen_q": max(shape.lengths), "max_seqlen_k": max(shape.lengths)}
        q_, k_, v_ = q_[0], k_[0], v_[0]
        return lambda: fastattn.attention(q_, k_, v_, **options)[None].transpose(1, 2)
    if shape.lengths:
        options["mask"] = rivals.mask_for(shape)
    return lambda: fastattn.attention(q_, k_, v_, **options).transpose(1, 2)


def _forward(row: str, shape: AttentionShape, dtype: str) -> Problem:
    q, k, v = tensors(shape, _dtype(dtype))
    bias = bias_for(shape, q.dtype)
    sample = Sample(shape)
    truth, plain = sample.law(q, k, v, bias)
    ways: dict[str, Rival] = {
        OURS: lambda: _fastattn(shape, q, k, v, bias),
        "SDPA": lambda: rivals.sdpa(shape, q, k, v, bias),
    }
    if shape.packed:
        ways["SDPA per sequence"] = lambda: rivals.sdpa_per_sequence(shape, q, k, v)
    if not row.startswith("over") and shape.nheads * shape.seqlen_q * shape.seqlen_k <= 1 << 26:
        ways["plain"] = lambda: rivals.plain(shape, q, k, v, bias)
    if row in ("window", "prefill", "padding mask", "additive bias"):
        ways["Flex"] = lambda: rivals.flex(shape, q, k, v, bias)
    contenders = [_forward_contender(name, way, sample) for name, way in ways.items()]
    if not row.startswith("over"):
        contenders += ort.contenders(shape, q, k, v, bias, sample.output)
    return Problem(truth, plain, contenders)


def _dtype(name: str) -> torch.dtype:
    from .case import DTYPES

    return DTYPES[name]


def _forward_contender(name: str, way: Rival, sample: Sample) -> Contender:
    def prepare() -> Prepared:
        call = way()

        def without_grad() -> Tensor:
            with torch.no_grad():
                return call()

        return Prepared(without_grad, sample.output)

    return Contender(name, prepare)


def _decode(row: str, shape: AttentionShape, dtype: str) -> Problem:
    """One new token against a cache in Hugging Face's memory order [batch, heads, slots, headdim]."""
    q, k, v = tensors(shape, _dtype(dtype))
    sample = Sample(shape)
    truth, plain = sample.law(q, k, v, None)
    seqlens = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    ways: dict[str, Rival] = {
        OURS: lambda: lambda: fastattn.attention_kvcache(q_, k_, v_, seqlens).transpose(1, 2),
        "SDPA": lambda: rivals.sdpa(shape, q, k, v, None),
        "SDPA folded": lambda: rivals.sdpa_folded(shape, q, k, v),
        "SDPA repeat_kv": lambda: rivals.sdpa_repeat_kv(shape, q, k, v),
    }
    contenders = [_forward_contender(name, way, sample) for name, way in ways.items()]
    return Problem(truth, plain, contenders + ort.contenders(shape, q, k, v, None, sample.output))


def _backward(row: str, shape: AttentionShape, dtype: str) -> Problem:
    """dq, dk, dv alone: the forward is done once and its graph kept. Gradients of a head depend on that head only."""
    q, k, v = (x.requires_grad_() for x in tensors(shape, _dtype(dtype)))
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).to(q.dtype)
    sample = Sample(shape)

    def pick(gradients: tuple[Tensor, ...]) -> Results:
        dq, dk, dv = (g.detach() for g in gradients)
        return {"dq": dq[sample.batch][:, sample.heads], "dk": sample.key(dk), "dv": sample.key(dv)}

    def law(dtype: torch.dtype) -> Results:
        parts = [x.detach().to(dtype) for x in (q[sample.batch][:, sample.heads], sample.key(k), sample.key(v))]
        parts = [x.transpose(1, 2).requires_grad_() for x in parts]
        o = reference.attention(*parts, causal=shape.causal)
        assert isinstance(o, Tensor)
        gradients = torch.autograd.grad(o, parts, do[sample.batch][:, sample.heads].to(dtype).transpose(1, 2))
        return dict(zip(("dq", "dk", "dv"), (g.transpose(1, 2) for g in gradients), strict=True))

    ways: dict[str, Rival] = {
        OURS: lambda: _fastattn(shape, q, k, v, None),
        "SDPA": lambda: rivals.sdpa(shape, q, k, v, None),
        "plain": lambda: rivals.plain(shape, q, k, v, None),
    }

    def contender(name: str, way: Rival) -> Contender:
        def prepare() -> Prepared:
            o = way()()
            return Prepared(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), pick)

        return Contender(name, prepare)

    def no_flex() -> Prepared:
        raise AbsentError("FlexAttention has no backward on a CPU")

    contenders = [contender(name, way) for name, way in ways.items()]
    return Problem(law(torch.float64), law(q.dtype), [*contenders, Contender("Flex", no_flex)])
