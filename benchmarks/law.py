"""The law: against float64, a result may err at most twice as much as plain PyTorch does in the same dtype.

Plain PyTorch is each room's reference run in that dtype, the truth the same reference in float64. Every output and
gradient is compared in its maximum and in the mean (RMS). Some last bits are always allowed, so that no result fails
beside a lucky, even exact, plain one. The tests, `fastattn verify`, and `fastattn bench`, which prints no time for a
result that breaks the law, all judge with `judge_tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

FACTOR = 2.0
FEW = 64  # tensors of fewer elements are too small to speak of a maximum

Results = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """One result against the truth: the worst tensor decides. `ratio` is error / plain error; lawful: no `reason`."""

    tensor: str
    error: float
    plain_error: float
    rms_ratio: float
    reason: str = ""

    @property
    def lawful(self) -> bool:
        return not self.reason

    @property
    def ratio(self) -> float:
        if self.error == 0.0:
            return 0.0
        return self.error / self.plain_error if self.plain_error else math.inf


def judge(results: Results, plain: Results, truth: Results, factor: float = FACTOR) -> Verdict:
    """The worst verdict over all named tensors (o, dq, ...). A missing or misshapen tensor is unlawful, not skipped."""
    inputs = max((t.dtype for t in plain.values()), key=lambda dtype: torch.finfo(dtype).eps)
    verdicts = [
        judge_tensor(name, results.get(name), plain[name], truth[name], inputs=inputs, factor=factor) for name in truth
    ]
    return max(verdicts, key=lambda v: (not v.lawful, v.ratio))


def judge_tensor(
    name: str,
    result: torch.Tensor | None,
    plain: torch.Tensor,
    truth: torch.Tensor,
    *,
    inputs: torch.dtype = torch.float32,
    terms: float = 0.0,
    factor: float = FACTOR,
) -> Verdict:
    """Whether `result` keeps the law, else why not, with the worst place.

    inputs: the dtype that the result was computed from. terms: the size of the terms that results are sums of, where
    these may cancel; the last bits allowed are relative to it then.
    """
    if result is None:
        return Verdict(name, math.inf, 0.0, math.inf, f"{name} is missing")
    if result.shape != truth.shape:
        shapes = f"{tuple(truth.shape)}, got {tuple(result.shape)}"
        return Verdict(name, math.inf, 0.0, math.inf, f"{name} must have shape {shapes}")
    rounded, truth = truth.to(plain.dtype), truth.double()
    for kind, where in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = where(result) != where(rounded)
        if wrong.any():
            reason = f"{kind} of {name} in the wrong place at {_describe(wrong, result, truth)}"
            return Verdict(name, math.inf, 0.0, math.inf, reason)
    finite = rounded.isfinite()
    if not finite.any():
        return Verdict(name, 0.0, 0.0, 0.0)
    size = torch.where(finite, truth, 0).abs()
    few = truth.numel() < FEW
    last_bits = _last_bits(plain.dtype, inputs, few=few, terms=terms)
    errors, plain_errors = _errors(result, truth, finite), _errors(plain, truth, finite)
    error, plain_error = float(errors.max()), float(plain_errors.max())
    rms, plain_rms = _rms(errors), _rms(plain_errors)
    limit = factor * plain_error + last_bits * max(float(size.max()), terms)
    rms_limit = factor * plain_rms + last_bits * (1 if few else 0.5) * max(_rms(size), terms)
    reason = ""
    if error > limit:
        reason = f"error of {name} is {error:.3e}, above {limit:.3e} (plain PyTorch {plain_error:.3e}), at "
    elif rms > rms_limit:
        reason = f"RMS error of {name} is {rms:.3e}, above {rms_limit:.3e} (plain PyTorch {plain_rms:.3e}), largest at "
    if reason:
        reason += _describe(errors == error, result, truth)
    return Verdict(name, error, plain_error, rms / plain_rms if plain_rms else 0.0, reason)


def _last_bits(dtype: torch.dtype, inputs: torch.dtype, *, few: bool, terms: float) -> float:
    """The relative error that is always allowed.

    One unit in the low dtypes, where rounding the result is most of any error; four in fp32, where intermediate
    results round too. More where terms cancel, and for a handful of numbers such as dsinks: they are long sums of
    terms that outweigh them. Results that are fp32 though the inputs are not (lse) are not asked for their last bits.
    """
    units = torch.finfo(dtype).eps
    if dtype == torch.float32:
        units *= 64 if terms else 32 if few else 4
    elif few:
        units *= 4
    return max(units, torch.finfo(inputs).eps * ((4 if few else 1) if terms else 1 / 16))


def _errors(x: torch.Tensor, truth: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    return torch.where(finite, x.double() - truth, 0).abs().nan_to_num(nan=float("inf"))


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def _describe(where: torch.Tensor, result: torch.Tensor, truth: torch.Tensor) -> str:
    index = tuple(int(i) for i in where.nonzero()[0])
    return f"{list(index)}: got {float(result[index])!r}, truth {float(truth[index])!r} ({int(where.sum())} places)"
