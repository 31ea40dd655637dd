"""The launches of layer_norm, rms_norm and rope that a GPU would make, recorded on CPU tensors for compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

import fastattn
from fastattn.runtime import launch

# One hidden size per tile shape of the plan (`_norm_triton._plan`), and those of models that are not powers of two.
HIDDEN = (64, 128, 256, 512, 768, 1024, 2048, 3000, 4096, 5120, 8192, 11008, 16384, 32768, 65536)
SAMPLE = (768, 8192, 65536)


def launches(arch: int, *, everything: bool) -> Iterator[launch.Launch]:
    yield from _norms(arch, HIDDEN if everything else SAMPLE, everything)
    yield from _rope(arch, everything)


def _norms(arch: int, sizes: tuple[int, ...], everything: bool) -> Iterator[launch.Launch]:
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if everything else (torch.bfloat16, torch.float32)
    for cols, dtype, rows in itertools.product(sizes, dtypes, (4, 2048) if everything else (2048,)):
        x, residual, y = (torch.empty(rows, cols, dtype=dtype, requires_grad=True) for _ in range(3))
        weight, bias = (torch.empty(cols, dtype=dtype, requires_grad=True) for _ in range(2))
        with launch.recording(arch) as recorded, fastattn.use_backend("triton"):
            for total in (None, residual):
                for out in (
                    fastattn.layer_norm(x, weight, bias, residual=total),
                    fastattn.rms_norm(x, weight, residual=total),
                ):
                    outs = out if isinstance(out, tuple) else (out,)
                    torch.autograd.grad(outs, (x, weight), (y,) * len(outs))
            if everything:
                fastattn.rms_norm(x, weight.float(), rounding="gemma")
                fastattn.layer_norm(x)
        yield from recorded.launches


def _rope(arch: int, everything: bool) -> Iterator[launch.Launch]:
    dtypes = (torch.bfloat16, torch.float32) if everything else (torch.bfloat16,)
    for dtype, interleaved, (headdim, half) in itertools.product(
        dtypes, (False, True), ((128, 64), (64, 32), (80, 16))
    ):
        q = torch.empty(2, 1024, 32, headdim, dtype=dtype, requires_grad=True)
        k = torch.empty(2, 1024, 8, headdim, dtype=dtype, requires_grad=True)
        cos, sin = (torch.empty(4096, half) for _ in range(2))
        ids = torch.empty(2, 1024, dtype=torch.int32)
        with launch.recording(arch) as recorded, fastattn.use_backend("triton"):
            out = fastattn.rope_qk(q, k, cos, sin, interleaved=interleaved)
            torch.autograd.grad(out, (q, k), (q, k))
            fastattn.rope(q, cos, sin, interleaved=interleaved, position_ids=ids)
        yield from recorded.launches
