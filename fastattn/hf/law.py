"""The law for models: errors against float64 at most twice eager's, and the float64 run that they are held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastattn.benchmarks.law import FACTOR, FEW

Tensor = torch.Tensor
ZERO = 1e-13  # of the largest gradient: what float64 leaves of a sum that cancels
Results = dict[str, Tensor]  # logits, loss, and "d <parameter>"


def law(ours: Results, plain: Results, truth: Results) -> tuple[float, str]:
    """(the worst ratio of our error to plain's, what breaks the law or "").

    Logits are judged by their maximum and RMS. The loss may err by twice the logits' RMS error, which bounds it. Each
    gradient's RMS error is judged relative to its size, by plain's error of that gradient or of all of them together,
    whichever is larger: a few numbers are lucky in one program or the other. Last bits are always allowed. A bias whose
    gradient is a sum that cancels to zero (of the keys' projection), or that has few numbers (a router's, which a softmax
    makes cancel), is as large as its weight's gradient there: both are sums of the same terms. A gradient that is zero
    altogether (of a router whose one choice is normalised, of queries whose values are all alike) is what rounding leaves
    of it in every program: it is judged beside the largest gradient, and no other by it.
    """
    if ours.keys() != truth.keys():
        return float("inf"), f"gradients of {sorted(ours.keys() ^ truth.keys())[:3]} on one side only"
    bad = [k for k, x in ours.items() if not bool(x.isfinite().all())]
    if bad:
        return float("inf"), f"{bad[0]} is not finite"
    eps = torch.finfo(ours["logits"].dtype).eps
    few = 32 * eps if eps < 1e-5 else 4 * eps  # of a handful of numbers, each a long sum
    errors = {k: (_rms(ours[k] - truth[k]), _rms(plain[k] - truth[k]), _size(k, truth)) for k in truth}
    steepest = max((_rms(x) for k, x in truth.items() if k[0] == "d"), default=0.0)
    zero = {k for k, (_, _, size) in errors.items() if k[0] == "d" and size <= ZERO * steepest}
    relative = [(a / size, b / size) for k, (a, b, size) in errors.items() if k[0] == "d" and k not in zero]
    pooled = [sum(x[i] ** 2 for x in relative) ** 0.5 / max(len(relative), 1) ** 0.5 for i in (0, 1)]
    largest = [float((x["logits"].double() - truth["logits"]).abs().max()) for x in (ours, plain)]
    judged = {
        "the largest logit": (largest[0], largest[1], eps * float(truth["logits"].abs().max())),
        "the logits' RMS": (*errors["logits"][:2], eps * errors["logits"][2]),
        "the gradients' RMS": (*pooled, eps),
    }
    ratio = max(a / b if b else float("inf") if a > last else 0.0 for a, b, last in judged.values())
    if "loss" in truth:
        a, b, size = errors["loss"]
        judged["the loss"] = (a, max(b, errors["logits"][1]), eps * size)
    for name, (a, b, size) in errors.items():
        if name in zero:
            judged[name] = (a, b, eps * steepest)
        elif name[0] == "d":
            judged[name] = (a, max(b, pooled[1] * size), (few if truth[name].numel() < FEW else eps) * size)
    for name, (a, b, last) in judged.items():
        if not a <= FACTOR * b + last:
            return ratio, f"error of {name} is {a:.2e}, eager's {b:.2e}"
    return ratio, ""


def _size(name: str, truth: Results) -> float:
    own, weight = _rms(truth[name]), truth.get(name.removesuffix("bias") + "weight")
    cancels = weight is not None and (own <= 1e-6 * _rms(weight) or truth[name].numel() < FEW)
    return max(own, _rms(weight)) if weight is not None and cancels else own


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


class _Widen(TorchFunctionMode):
    """float32 asked for by name becomes float64: norms and softmax of a float64 model are float64 to the end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*wide, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@contextmanager
def float64() -> Iterator[None]:
    """Constants, casts and statistics in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(before)
