"""The law: against float64, a kernel may err at most twice as much as plain PyTorch does in the same dtype.

`check` runs a function three ways on the same numbers: as it is (got), its reference in the same dtype (plain) and
its reference in float64 (truth), forward and backward, and holds every output and gradient to `fastattn.benchmarks.law`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fastattn.benchmarks.law import judge_tensor

LOW = (torch.float32, torch.bfloat16, torch.float16)
_KEEP_DTYPE = ("alibi_slopes", "position_ids")  # float64 is not among what they may be


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: dict[str, torch.Tensor],
    options: dict[str, Any] | None = None,
    *,
    wants: Iterable[str] = (),
    names: Sequence[str] = ("o", "lse"),
    seed: int = 0,
    terms: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Hold function(**tensors, **options) and its gradients for `wants` to the law. Returns what the function gave.

    terms: the size of the terms that results are sums of, where these may cancel; the floor is relative to it then.
    """
    wants = tuple(wants)
    got = run(function, tensors, options or {}, wants, names, seed)
    plain = run(reference, tensors, options or {}, wants, names, seed)
    truth = run(reference, {k: _double(k, t) for k, t in tensors.items()}, options or {}, wants, names, seed)
    assert got.keys() == truth.keys()
    inputs = next(iter(tensors.values())).dtype
    for name in got:
        compare(name, got[name], plain[name], truth[name], inputs, terms)
    return got


def run(
    function: Callable[..., Any],
    tensors: dict[str, torch.Tensor],
    options: dict[str, Any],
    wants: Sequence[str],
    names: Sequence[str],
    seed: int,
) -> dict[str, torch.Tensor]:
    """Outputs by name, and the gradient of each wanted tensor as d<name>. Cotangents depend on seed and shape alone."""
    leaves = {name: t.detach().requires_grad_(name in wants) for name, t in tensors.items()}
    torch.manual_seed(seed)  # dropout draws from torch's generator
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = dict(zip(names, (o.detach() for o in outputs), strict=False))
    if wants:
        generator = torch.Generator("cpu").manual_seed(seed + 1)
        low = torch.bfloat16  # representable in every dtype, so that all three runs see the same numbers
        cotangents = [torch.randn(o.shape, generator=generator, device="cpu").to(low).to(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, [leaves[name] for name in wants], cotangents)
        found.update({f"d{name}": g for name, g in zip(wants, gradients, strict=True)})
    return found


def compare(
    name: str,
    got: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    inputs: torch.dtype = torch.float32,
    terms: float = 0.0,
) -> None:
    """Raise AssertionError, with the worst index and both values, when `got` breaks the law."""
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    verdict = judge_tensor(name, got, plain, truth, inputs=inputs, terms=terms)
    assert verdict.lawful, verdict.reason


def _double(name: str, t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() and name not in _KEEP_DTYPE else t


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Normal numbers, the same for every layout and device (by default torch's). `.to` would lose the layout.

    contiguous; transposed: dimensions 1 and 2 swapped in memory (a bshd view of bhsd); sliced: every second row of a
    wider tensor, shifted by an odd number of elements; expanded: the first dimension repeats one entry with stride 0.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cpu").to(device or torch.get_default_device(), dtype)
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":
        wide = x.new_full((*shape[:-3], 2 * shape[-3], shape[-2], shape[-1] + 5), float("nan"))
        view = wide[..., ::2, :, 3 : 3 + shape[-1]]
        view.copy_(x)
        return view
    if layout == "expanded":
        return x[:1].expand(shape)
    raise ValueError(f"randn: layout must be contiguous, transposed, sliced or expanded, got {layout!r}")


LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
