"""The launches of rope and rope_qk in CUDA C++, recorded on CPU tensors for the audit of compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fastattn
from fastattn.runtime import cuda

TYPES = (
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
)


def launches(arch: int, *, everything: bool) -> Iterator[cuda.Launch]:
    for dtype, table_dtype in TYPES if everything else TYPES[:1]:
        for half in (32, 31):  # packs of 16 bytes, and element by element
            q, k = (torch.empty(1, 16, heads, 64, dtype=dtype) for heads in (4, 2))
            cos, sin = (torch.empty(16, half, dtype=table_dtype) for _ in range(2))
            with cuda.recording(arch) as recorded, fastattn.use_backend("cuda"):
                fastattn.rope_qk(q, k, cos, sin)
            yield from recorded.launches


def expected(kernel: cuda.Kernel, arch: int) -> tuple[str, ...]:
    wide = kernel.constants[2] != "1"
    return ("LDG.E.NA.128.CONSTANT", "LDG.E.128.CONSTANT", "STG.E.NA.128") if wide else ()
