"""Where does a patched model leave eager? The error of every module's output against float64, patched and eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastattn.benchmarks.law import FACTOR
from fastattn.hf.law import float64
from fastattn.hf.patching import patch, unpatch
from fastattn.hf.report import Report

Tensor = torch.Tensor


@dataclass(frozen=True)
class Layer:
    """One module's output: RMS error over the RMS of the truth, of the patched model (ours) and of eager.

    largest, eager_largest: the largest errors, absolute; scale: the largest true value
    """

    path: str
    module: str
    ours: float
    eager: float
    largest: float
    eager_largest: float
    scale: float
    last_bit: float

    @property
    def ratio(self) -> float:
        return self.ours / self.eager if self.eager else (float("inf") if self.ours > self.last_bit else 0.0)

    @property
    def lawful(self) -> bool:
        rms = self.ours <= FACTOR * self.eager + self.last_bit
        return rms and self.largest <= FACTOR * self.eager_largest + self.last_bit * self.scale


def compare(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Layer], Report]:
    """Run `model` eager, eager in float64 and patched on the batch; every module's output in order of execution.

    model  a transformers model with attn_implementation="eager", in the dtype to be judged; it is left unpatched
    batch  its keyword arguments; with an attention_mask [batch, seqlen], only tokens are compared

    Returns the layers, the last one the model itself, and what was patched.
    """
    model = model.eval()
    tokens = batch.get("attention_mask")
    with torch.no_grad():
        eager = _outputs(model, batch, tokens)
        wide = copy.deepcopy(model).double()
        with float64():
            truth = _outputs(wide, {k: _wide(v) for k, v in batch.items()}, tokens)
        del wide
        report = patch(model)
        try:
            ours = _outputs(model, batch, tokens)
        finally:
            unpatch(model)
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    common = [path for path in truth if path in ours and path in eager]
    return [_layer(path, classes[path], ours[path], eager[path], truth[path]) for path in common], report


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _layer(path: str, module: str, ours: Tensor, eager: Tensor, truth: Tensor) -> Layer:
    a, b = ((x.double() - truth).abs().nan_to_num(nan=float("inf")) for x in (ours, eager))
    size = max(float(truth.square().mean().sqrt()), 1e-300)
    rms_a, rms_b = (float(x.square().mean().sqrt()) / size for x in (a, b))
    largest = (float(a.max()), float(b.max()), float(truth.abs().max()))
    return Layer(path or "(model)", module, rms_a, rms_b, *largest, torch.finfo(eager.dtype).eps)


def _outputs(model: nn.Module, batch: Mapping[str, Any], tokens: Any) -> dict[str, Tensor]:
    """The first floating tensor that each module returned in its last call."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = next(_floating(output), None)
            if tensor is not None and tensor.numel():
                found.pop(path, None)
                found[path] = _valid(tensor.detach(), tokens).clone()

        return hook

    with _hooks(model, keep):
        model(**batch)
    return found


@contextmanager
def _hooks(model: nn.Module, keep: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim() > 0:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating(value)


def _valid(tensor: Tensor, tokens: Any) -> Tensor:
    fits = isinstance(tokens, Tensor) and tokens.dim() == 2 and tensor.dim() >= 3 and tensor.shape[:2] == tokens.shape
    return tensor[tokens.bool()] if fits else tensor
