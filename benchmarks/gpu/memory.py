"""Norms and RoPE on a GPU: bound by memory, so the share is of the copy bandwidth of the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.ops.layer_norm.reference import layer_norm as layer_norm_reference
from fastattn.ops.rms_norm.reference import rms_norm as rms_norm_reference
from fastattn.ops.rope.reference import rope_qk as rope_reference

from .. import rivals
from .._norm import NAMES, SLOPPY
from ..case import DTYPES, OURS, AbsentError, Case, Contender, Prepared, Problem
from ..law import Results
from ..shapes import norm_backward_bytes, norm_forward_bytes, rope_bytes

Tensor = torch.Tensor
Norm = Callable[..., Tensor]
# rows, cols: 64 million elements over the hidden sizes of models; few rows; many short rows
NORMS = [(1 << 26 >> i, 1 << i) for i in range(6, 16)] + [(16384, 768), (16384, 5120), (8, 4096), (128, 8192)]
ROPE = [(1, 16384, 32, 8, 128), (8, 2048, 32, 32, 128), (16, 1024, 16, 16, 64), (64, 1, 32, 8, 128)]


def cases(part: str, device: torch.device, quick: bool = False) -> list[Case]:
    """part: norms or rope."""
    if part == "rope":
        return [_rope_case(shape, "bf16", device) for shape in (ROPE[:1] if quick else ROPE)]
    found = []
    for rows, cols in NORMS[2:9:3] if quick else NORMS:
        for room in ("layer_norm", "rms_norm"):
            for direction, count, build in (
                ("forward", norm_forward_bytes, _forward),
                ("backward", norm_backward_bytes, _backward),
            ):
                problem = partial(build, room, rows, cols, torch.bfloat16, device)
                work = count(rows, cols, 2)
                found.append(Case(room, direction, f"{rows}x{cols}", "bf16", "copy", work, problem))
    return found


def _liger(room: str) -> Norm:
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError as missing:
        raise AbsentError(f"liger-kernel is not installed ({missing})") from None
    if room == "rms_norm":
        return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
    return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5)


def _quack(room: str) -> Norm:
    try:
        import quack
    except ImportError as missing:
        raise AbsentError(f"quack is not installed ({missing})") from None
    if room == "layer_norm":
        raise AbsentError("quack's layer norm has no backward")
    return lambda x, w: quack.rmsnorm(x, w, eps=1e-6)


def _ways(room: str) -> tuple[dict[str, Callable[[], Norm]], Norm, int]:
    """The contenders, the reference, and how many vectors they take."""
    if room == "layer_norm":

        def torch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.layer_norm(x, w.shape, w, b)

        ways: dict[str, Callable[[], Norm]] = {
            OURS: lambda: fastattn.layer_norm,  # type: ignore[dict-item, return-value]
            "F.layer_norm": lambda: torch_norm,
            "compiled": lambda: rivals.compiled(torch_norm),
        }
        reference, vectors = layer_norm_reference, 2
    else:

        def llama(x: Tensor, w: Tensor) -> Tensor:
            return rivals.llama_rms_norm(x, w, 1e-6)

        ways = {
            OURS: lambda: fastattn.rms_norm,  # type: ignore[dict-item, return-value]
            "F.rms_norm": lambda: lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
            "compiled": lambda: rivals.compiled(llama),
        }
        reference, vectors = rms_norm_reference, 1  # type: ignore[assignment]
    ways |= {"Liger": lambda: _liger(room), "quack": lambda: _quack(room)}
    return ways, reference, vectors  # type: ignore[return-value]


def _arguments(rows: int, cols: int, dtype: torch.dtype, device: torch.device, vectors: int) -> tuple[Any, ...]:
    g = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(rows, cols, generator=g, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    parameters = [(1 + 0.1 * torch.randn(cols, generator=g, device=device)).to(dtype) for _ in range(vectors)]
    return x, parameters, dy


def _forward(room: str, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Problem:
    ways, reference, vectors = _ways(room)
    x, parameters, _ = _arguments(rows, cols, dtype, device, vectors)
    some = torch.linspace(0, rows - 1, min(rows, 256), device=device).long()

    def law(dtype: torch.dtype) -> Results:
        return {"y": reference(x[some].to(dtype), *(p.to(dtype) for p in parameters))}

    def contender(name: str, way: Callable[[], Norm]) -> Contender:
        def prepare() -> Prepared:
            norm = way()

            def call() -> Tensor:
                with torch.no_grad():
                    return norm(x, *parameters)

            return Prepared(call, lambda y: {"y": y[some]})

        return Contender(name, prepare)

    return Problem(law(torch.float64), law(dtype), [contender(name, way) for name, way in ways.items()])


def _backward(room: str, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Problem:
    ways, reference, vectors = _ways(room)
    x, parameters, dy = _arguments(rows, cols, dtype, device, vectors)
    leaves = [x.requires_grad_(), *(p.requires_grad_() for p in parameters)]

    def named(gradients: tuple[Tensor, ...]) -> Results:
        return {name: g.detach() for name, g in zip(NAMES, gradients, strict=False)}

    def law(dtype: torch.dtype) -> Results:
        wide = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        return named(torch.autograd.grad(reference(*wide), wide, dy.to(dtype)))

    def contender(name: str, way: Callable[[], Norm]) -> Contender:
        def prepare() -> Prepared:
            y = way()(*leaves)
            return Prepared(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), named)

        return Contender(name, prepare)

    contenders = [contender(name, way) for name, way in ways.items()]
    return Problem(law(torch.float64), law(dtype), contenders, rival_factor=SLOPPY)


def _rope_case(shape: tuple[int, ...], dtype: str, device: torch.device) -> Case:
    batch, seqlen, nheads, nheads_k, headdim = shape
    work = rope_bytes(batch, seqlen, nheads + nheads_k, headdim, DTYPES[dtype].itemsize)
    label = f"{batch}x{seqlen}x{nheads}/{nheads_k}x{headdim}"
    return Case("rope", "forward", label, dtype, "copy", work, partial(_rope, shape, DTYPES[dtype], device))


def _rope(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    batch, seqlen, nheads, nheads_k, headdim = shape
    g = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(batch, seqlen, h, headdim, generator=g, device=device).to(dtype) for h in (nheads, nheads_k))
    angle = torch.arange(seqlen, device=device)[:, None] / 1e4 ** torch.linspace(0, 1, headdim // 2, device=device)
    cos, sin = (t.to(dtype) for t in (angle.cos(), angle.sin()))
    wide_cos, wide_sin = (torch.cat((t, t), -1) for t in (cos, sin))
    q_, k_ = q.transpose(1, 2), k.transpose(1, 2)

    def named(pair: tuple[Tensor, Tensor]) -> Results:
        return {"q": pair[0], "k": pair[1]}

    def swapped(pair: tuple[Tensor, Tensor]) -> Results:
        return named((pair[0].transpose(1, 2), pair[1].transpose(1, 2)))

    def law(dtype: torch.dtype) -> Results:
        return named(rope_reference(*(t.to(dtype) for t in (q, k, cos, sin))))

    def compiled() -> Prepared:
        call = rivals.compiled(rivals.rotate_half_rope)
        return Prepared(lambda: call(q_, k_, wide_cos, wide_sin), swapped)

    contenders = [
        Contender(OURS, lambda: Prepared(lambda: fastattn.rope_qk(q, k, cos, sin), named)),
        Contender("HF formula", lambda: Prepared(lambda: rivals.rotate_half_rope(q_, k_, wide_cos, wide_sin), swapped)),
        Contender("compiled", compiled),
    ]
    truth = law(torch.float64)
    plain = swapped(rivals.rotate_half_rope(q_, k_, wide_cos, wide_sin))  # rounds after every operation
    return Problem(truth, plain, contenders)
