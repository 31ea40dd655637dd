"""The launches of layer_norm and rms_norm in CUDA C++, recorded on CPU tensors for the audit of compiled kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

import fastattn
from fastattn.runtime import cuda

ARCHS = (80, 90, 100)  # for sm_120 the backward kernel of 16-bit rows spills 8 bytes per thread
TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
# One size per kernel of the plans: several rows per thread, one row per warp, block and cluster, rows that are read twice;
# and the same where nothing is 16 bytes wide.
COLS = (128, 768, 4096, 16384, 65536, 1 << 20, 333, 262145)
STREAMED = ("LDG.E.NA.128.CONSTANT", "STG.E.NA.128")


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    if everything:
        for types, cols in itertools.product(TYPES, COLS):
            yield from _record(arch, *types, cols)
    else:
        for types, cols in zip(TYPES, COLS[1:], strict=False):
            yield from _record(arch, *types, cols)


def _record(arch: int, dtype: torch.dtype, weight_dtype: torch.dtype, cols: int) -> Iterator[cuda.Launch]:
    x, residual = (torch.empty(4, cols, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.empty(cols, dtype=weight_dtype, requires_grad=True) for _ in range(2))
    with cuda.recording(arch) as recorded, fastattn.use_backend("cuda"):
        out = fastattn.layer_norm(x, weight, bias, residual=residual)
        torch.autograd.grad(out, (x, weight, bias), out)
    yield from recorded.launches


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    if kernel.name == "norm_reduce_kernel":
        return ()
    width = kernel.constants[1 if kernel.name == "norm_bwd_columns_kernel" else 2]
    if width == "1":
        return ()
    found = STREAMED[:1] if kernel.name == "norm_bwd_columns_kernel" else STREAMED
    return (*found, "UCGABAR_ARV") if kernel.constants[-1] == "true" else found
