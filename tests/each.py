"""Test parameters for functions that `use_backend` forces: every backend, and for cpu every instruction set.

On machines without a GPU `triton` runs in Triton's interpreter and `cuda` in the emulator, where the compiler that it needs
is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import emulator
import torch

import fastattn
from fastattn.runtime import native

ISAS = tuple(native.module().isas()) if native.error() is None else ()
CUDA = ("cuda",) if torch.cuda.is_available() or emulator.available() else ()
WAYS = (*(f"cpu-{isa}" for isa in ISAS), "eager", "triton", *CUDA, "reference")


@contextlib.contextmanager
def placed(name: str) -> Iterator[str]:
    """Tensors made without a device lie where that way wants them."""
    device = "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    with torch.device(device):
        yield name


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """`eager` forces no backend: calls without grad take the short road; the others force theirs."""
    backend, _, isa = name.partition("-")
    if name == "eager":
        yield
        return
    before = native.module().isa() if isa else ""
    if isa:
        native.module().set_isa(isa)
    try:
        with fastattn.use_backend(backend):
            yield
    finally:
        if isa:
            native.module().set_isa(before)


def bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers, so that equality means the same bits."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def row_views(rows: int, cols: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of [2, 3, rows, cols] with unit last stride: contiguous, axes swapped, rows skipped, expanded."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    return {
        "contiguous": numbers(2, 3, rows, cols),
        "transposed": numbers(2, rows, 3, cols).transpose(1, 2),
        "sliced": numbers(2, 3, 2 * rows, cols + 3)[:, :, ::2, 3:],
        "permuted": numbers(rows, 3, 2, cols).permute(2, 1, 0, 3),
        "expanded": numbers(2, 1, rows, cols).expand(2, 3, rows, cols),
    }
