"""What the tests of Hopper's attention kernels have in common: they run on such a GPU where there is one, else in the emulator."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import law
import pytest
import torch
from attention_calls import DEVICE, NHEADS, Tensors

import fastattn
from fastattn.ops.attention import reference
from fastattn.runtime import cuda

if cuda.objections(DEVICE):
    pytest.skip("; ".join(cuda.objections(DEVICE)), allow_module_level=True)
if cuda.arch(torch.device(DEVICE)) != 90:
    pytest.skip("these kernels run on compute capability 9.0", allow_module_level=True)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that a test launches from now on."""
    seen: list[str] = []
    usual = cuda.run

    def run(kernel: cuda.Kernel, *args: Any) -> None:
        seen.append(str(kernel))
        usual(kernel, *args)

    monkeypatch.setattr(cuda, "run", run)
    return seen


def qkv(
    seqlen_q: int,
    seqlen_k: int,
    headdim: int = 64,
    headdim_v: int | None = None,
    *,
    batch: int = 1,
    nheads: int = NHEADS,
    nheads_k: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "contiguous",
    seed: int = 0,
) -> Tensors:
    kind: dict[str, Any] = {"dtype": dtype, "layout": layout, "device": DEVICE}
    sizes = (("q", seqlen_q, nheads, headdim), ("k", seqlen_k, nheads_k, headdim), ("v", seqlen_k, nheads_k, headdim_v))
    return {
        name: law.randn(batch, seqlen, heads, width or headdim, **kind, seed=seed + i)
        for i, (name, seqlen, heads, width) in enumerate(sizes)
    }


def on_cuda(*args: Any, **kwargs: Any) -> Any:
    return fastattn.attention(*args, backend="cuda", **kwargs)


def holds(
    kernel: str,
    launched: list[str],
    tensors: Tensors,
    options: dict[str, Any],
    wants: tuple[str, ...] = (),
    terms: float = 0.0,
) -> Tensors:
    """The law, of a call that meets this kernel; with cotangents for o and lse where gradients are wanted."""
    found = law.check(on_cuda, reference.attention, tensors, {"return_lse": True, **options}, wants=wants, terms=terms)
    assert any(name.startswith(kernel) for name in launched), launched
    return found


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Options whose tensors are made when a test runs, not when it is collected."""
    made = {name: x() if callable(x) else x for name, x in options.items()}
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in made.items()}


def bias(*shape: int) -> torch.Tensor:
    """Of floats, some of which hide their key; on the device, because moving a slice there changes its strides."""
    return law.randn(*shape, seed=4).masked_fill(torch.rand(shape) < 0.1, -math.inf).to(DEVICE)


def packed(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def reorder(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In the emulator threads run in another order, and copies land at other times."""
    if DEVICE == "cpu":
        import emulator

        monkeypatch.setattr(cuda, "emulator", functools.partial(emulator.run, seed=seed))
