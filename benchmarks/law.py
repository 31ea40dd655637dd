"""The law: the largest error against float64 is at most twice that of plain PyTorch in the same dtype.

Plain PyTorch is each room's reference run in that dtype, the truth the same reference in float64. The last bits of the
largest true value are always allowed (one unit in bf16 and fp16, four in fp32, where intermediate results round too),
so that no result fails beside a lucky, even exact, plain one.
`fastattn verify` prints these ratios; `fastattn bench` prints no time for a result that breaks the law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

FACTOR = 2.0
# In units in the last place of the largest true value.
LAST_BITS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}

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
    verdicts = [judge_tensor(name, results.get(name), plain[name], truth[name], factor) for name in truth]
    return max(verdicts, key=lambda v: (not v.lawful, v.ratio))


def judge_tensor(
    name: str, result: torch.Tensor | None, plain: torch.Tensor, truth: torch.Tensor, factor: float = FACTOR
) -> Verdict:
    if result is None:
        return Verdict(name, math.inf, 0.0, math.inf, f"{name} is missing")
    if result.shape != truth.shape:
        shapes = f"{tuple(truth.shape)}, got {tuple(result.shape)}"
        return Verdict(name, math.inf, 0.0, math.inf, f"{name} must have shape {shapes}")
    dtype, result, plain = plain.dtype, result.detach().double(), plain.detach().double()
    finite = truth.isfinite()
    # Infinities (lse of an empty row) must be equal; NaN never is.
    if not torch.equal(result[~finite], truth[~finite]) or not bool(result[finite].isfinite().all()):
        return Verdict(name, math.inf, 0.0, math.inf, f"{name} has NaN or infinity where the truth has none")
    if truth[finite].numel() == 0:
        return Verdict(name, 0.0, 0.0, 0.0)
    difference, allowed = (result - truth)[finite].abs(), (plain - truth)[finite].abs()
    error, plain_error = float(difference.max()), float(allowed.nan_to_num(nan=0.0).max())
    rms, plain_rms = float(difference.square().mean().sqrt()), float(allowed.nan_to_num(nan=0.0).square().mean().sqrt())
    slack = LAST_BITS[dtype] * torch.finfo(dtype).eps * float(truth[finite].abs().max())
    reason = ""
    if error > factor * plain_error + slack:
        reason = f"error of {name} is {error:.3g}, plain PyTorch's {plain_error:.3g}"
    return Verdict(name, error, plain_error, rms / plain_rms if plain_rms else 0.0, reason)
