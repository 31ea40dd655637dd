"""The law: against float64, a kernel may err at most twice as much as plain PyTorch does in the same dtype.

`check` runs a function three ways on the same numbers: as it is (got), its reference in the same dtype (plain) and its
reference in float64 (truth), forward and backward, and compares every output and gradient in the maximum and in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

FACTOR = 2.0
FEW = 64
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
) -> dict[str, torch.Tensor]:
    """Hold function(**tensors, **options) and its gradients for `wants` to the law. Returns what the function gave."""
    wants = tuple(wants)
    got = run(function, tensors, options or {}, wants, names, seed)
    plain = run(reference, tensors, options or {}, wants, names, seed)
    truth = run(reference, {k: _double(k, t) for k, t in tensors.items()}, options or {}, wants, names, seed)
    assert got.keys() == truth.keys()
    inputs = next(iter(tensors.values())).dtype
    for name in got:
        compare(name, got[name], plain[name], truth[name], inputs)
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
        generator = torch.Generator().manual_seed(seed + 1)
        low = torch.bfloat16  # representable in every dtype, so that all three runs see the same numbers
        cotangents = [torch.randn(o.shape, generator=generator).to(low).to(o.dtype) for o in outputs]
        gradients = torch.autograd.grad(outputs, [leaves[name] for name in wants], cotangents)
        found.update({f"d{name}": g for name, g in zip(wants, gradients, strict=True)})
    return found


def compare(
    name: str, got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, inputs: torch.dtype = torch.float32
) -> None:
    """Raise AssertionError, with the worst index and both values, when `got` breaks the law for inputs of that dtype."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    rounded = truth.to(got.dtype)
    for kind, where in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = where(got) != where(rounded)
        assert not wrong.any(), f"{name}: {kind} in the wrong place at {_describe(wrong, got, truth)}"
    finite = rounded.isfinite()
    if not finite.any():
        return
    truth = truth.double()
    error, plain_error = _error(got, truth, finite), _error(plain, truth, finite)
    size = torch.where(finite, truth, 0).abs()
    # The floor keeps a lucky (even exact) plain result from forbidding the last bits of a number's own format: one unit in
    # the low dtypes, where rounding the result is most of any error; four in fp32, where intermediate results round too.
    floor = torch.finfo(got.dtype).eps * (4 if got.dtype == torch.float32 else 1)
    if truth.numel() < FEW:  # such as dsinks: long sums of terms that outweigh them, and too few to speak of a maximum
        floor *= 16
    floor = max(floor, torch.finfo(inputs).eps / 64)  # lse is fp32, but nobody asks for its last bits from bf16 scores
    limit = FACTOR * plain_error.max() + floor * size.max()
    worst = f"{name}: error {error.max():.3e} above {limit:.3e} (plain PyTorch {plain_error.max():.3e}) at "
    assert error.max() <= limit, worst + _describe(error == error.max(), got, truth)
    rms, plain_rms = _rms(error), _rms(plain_error)
    limit = FACTOR * plain_rms + floor / 2 * _rms(size)
    worst = f"{name}: RMS error {rms:.3e} above {limit:.3e} (plain PyTorch {plain_rms:.3e}), largest at "
    assert rms <= limit, worst + _describe(error == error.max(), got, truth)


def _double(name: str, t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() and name not in _KEEP_DTYPE else t


def _error(x: torch.Tensor, truth: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    return torch.where(finite, x.double() - truth, 0).abs().nan_to_num(nan=float("inf"))


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def _describe(where: torch.Tensor, got: torch.Tensor, truth: torch.Tensor) -> str:
    index = tuple(int(i) for i in where.nonzero()[0])
    return f"{list(index)}: got {float(got[index])!r}, truth {float(truth[index])!r} ({int(where.sum())} places)"


def randn(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for every layout.

    contiguous; transposed: dimensions 1 and 2 swapped in memory (a bshd view of bhsd); sliced: every second row of a wider
    tensor, shifted by an odd number of elements; expanded: the first dimension repeats one entry with stride 0.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":
        wide = torch.full((*shape[:-3], 2 * shape[-3], shape[-2], shape[-1] + 5), float("nan"), dtype=dtype)
        view = wide[..., ::2, :, 3 : 3 + shape[-1]]
        view.copy_(x)
        return view
    if layout == "expanded":
        return x[:1].expand(shape)
    raise ValueError(f"randn: layout must be contiguous, transposed, sliced or expanded, got {layout!r}")


LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
