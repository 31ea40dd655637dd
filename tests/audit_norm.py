"""The launches of layer_norm and rms_norm in CUDA C++, recorded on CPU tensors for the audit of compiled kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

import fastattn
from fastattn.runtime import cuda

TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
# Rows of every kind that the plans tell apart, as 16-byte packs and, by an odd number of columns, element by element: several
# per thread; of one warp, one block, a cluster; held by more threads or in more stages; read twice.
COLS = (128, 768, 4096, 16384, 20480, 40960, 65536, 81920, 131072, 1 << 20, 333, 5001, 262145)
SAMPLE = (768, 16384, 65536, 333)
STREAMED = ("LDG.E.NA.128.CONSTANT", "STG.E.NA.128")
STAGED = ("LDGSTS.E.BYPASS.LTC128B.128", "LDS.128")


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    for types, cols in itertools.product(TYPES, COLS) if everything else zip(TYPES, SAMPLE, strict=False):
        for residual in (False, True) if everything else (True,):
            yield from _record(arch, *types, cols, residual)


def _record(
    arch: int, dtype: torch.dtype, weight_dtype: torch.dtype, cols: int, residual: bool
) -> Iterator[cuda.Launch]:
    x = torch.empty(4, cols, dtype=dtype, requires_grad=True)
    weight, bias = (torch.empty(cols, dtype=weight_dtype, requires_grad=True) for _ in range(2))
    with cuda.recording(arch) as recorded, fastattn.use_backend("cuda"):
        out = fastattn.layer_norm(x, weight, bias, residual=torch.empty_like(x) if residual else None)
        torch.autograd.grad(out, (x, weight, bias), out)
    yield from recorded.launches


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    load, store = STREAMED
    name, constants = kernel.name, kernel.constants
    if name == "norm_reduce_kernel" or constants[1 if name == "norm_bwd_columns_kernel" else 2] == "1":
        return ()
    if name == "norm_bwd_columns_kernel":
        return (load,)
    staged = name == "norm_bwd_kernel" or (name == "norm_fwd_long_kernel" and constants[4] == "true")
    clustered = staged and constants[-1] == "true"
    return (*(STAGED if staged else (load,)), store, *(("UCGABAR_ARV",) if clustered else ()))
