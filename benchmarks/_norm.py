"""What the benches of layer_norm and rms_norm share: tensors, the law, forward and backward contenders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .case import DTYPES, Case, Contender, Prepared, Problem
from .law import Results
from .shapes import NORMS, norm_backward_bytes, norm_forward_bytes

Tensor = torch.Tensor
Norm = Callable[..., Any]
LARGE = 32 << 20  # glibc gives larger blocks back to the kernel, so every fresh output pays its page faults


def cases(room: str, ways: dict[str, Callable[[], Norm]], reference: Norm, parameters: int, quick: bool) -> list[Case]:
    """Forward and backward with malloc pinned, and the large outputs again under the default malloc.

    ways        name -> () -> norm(x, *parameters), ours first
    parameters  how many vectors of length cols the norm takes: weight, or weight and bias
    """
    found = []
    for rows, cols in NORMS[1:2] if quick else NORMS:
        for dtype in ("fp32", "bf16"):
            size = 4 if dtype == "fp32" else 2
            directions = [("forward", norm_forward_bytes, _forward), ("backward", norm_backward_bytes, _backward)]
            for direction, count, build in directions:
                problem = partial(build, ways, reference, parameters, rows, cols, DTYPES[dtype])
                work = count(rows, cols, size)
                case = Case(room, direction, f"{rows}x{cols}", dtype, "copy", work, problem, malloc="pinned")
                found.append(case)
                if direction == "forward" and rows * cols * size >= LARGE:
                    row = "large output"
                    found.append(Case(room, row, f"{rows}x{cols}", dtype, "copy", work, problem, malloc="default"))
    return found


def _arguments(rows: int, cols: int, dtype: torch.dtype, parameters: int) -> tuple[Tensor, list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, cols, generator=g).to(dtype) for _ in range(2))
    vectors = [(1 + 0.1 * torch.randn(cols, generator=g)).to(dtype) for _ in range(parameters)]
    return x, vectors, dy


def _forward(ways, reference, parameters, rows, cols, dtype) -> Problem:
    x, vectors, _ = _arguments(rows, cols, dtype, parameters)

    def law(dtype: torch.dtype) -> Results:
        return {"y": reference(x.to(dtype), *(v.to(dtype) for v in vectors))}

    def contender(name: str, way: Callable[[], Norm]) -> Contender:
        def prepare() -> Prepared:
            norm = way()

            def call() -> Tensor:
                with torch.no_grad():
                    return norm(x, *vectors)

            return Prepared(call, lambda y: {"y": y})

        return Contender(name, prepare)

    return Problem(law(torch.float64), law(dtype), [contender(name, way) for name, way in ways.items()])


# PyTorch's own weight gradients add thousands of rows one by one: F.layer_norm in bf16 makes 33 times the error of a sum
# that splits, torch.compile in fp32 16 times. They are what people use: they are timed, and the table says their error.
SLOPPY = 64.0

NAMES = ("dx", "dweight", "dbias")


def _backward(ways, reference, parameters, rows, cols, dtype) -> Problem:
    x, vectors, dy = _arguments(rows, cols, dtype, parameters)
    leaves = [x.requires_grad_(), *(v.requires_grad_() for v in vectors)]

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
