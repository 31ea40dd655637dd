"""LayerNorm and RMSNorm: torch's modules on fastattn's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.nn._nested import over_rows
from fastattn.nn._twin import twin_of
from fastattn.ops._check import fail
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.rms_norm import rms_norm

Tensor = torch.Tensor


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on fastattn.layer_norm, any normalized_shape; with `residual` it also adds (arXiv:1607.06450).

    >>> norm = fastattn.nn.LayerNorm(512)
    >>> y, stream = norm(branch, residual=stream)
    """

    @classmethod
    def from_torch(cls, module: torch.nn.LayerNorm) -> LayerNorm:
        """The same module, parameters shared, computing on fastattn."""
        return twin_of(cls, module)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:  # type: ignore[override]
        """Normalise x [..., *normalized_shape], or x + residual; both may be nested tensors.

        Returns y; with residual the pair (y, x + residual). Raises what torch raises for shapes that do not fit.
        """
        if x.is_nested:
            return over_rows(self.forward, "layer_norm", self.normalized_shape, x, residual)
        if not _fits(x, self.normalized_shape):
            return super().forward(x)  # torch refuses it in its own words
        rows, residual_rows, weight, bias = _rows(self.normalized_shape, x, residual, self.weight, self.bias)
        return _shaped(layer_norm(rows, weight, bias, eps=self.eps, residual=residual_rows), x.shape)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on fastattn.rms_norm, any normalized_shape; with `residual` it also adds (arXiv:1910.07467).

    Rounds where torch does, after the weight (`rounding="last"`). For models that round before it (Llama) give
    `rounding="llama"`; eps=None is the machine epsilon of the arithmetic, float32 or float64.

    >>> norm = fastattn.nn.RMSNorm(512, eps=1e-6)
    >>> y, stream = norm(branch, residual=stream)
    """

    def __init__(self, *args: Any, rounding: str = "last", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = rounding

    @classmethod
    def from_torch(cls, module: torch.nn.RMSNorm) -> RMSNorm:
        """The same module, parameters shared, computing on fastattn."""
        twin = twin_of(cls, module)
        twin.__dict__.setdefault("rounding", "last")
        return twin

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:  # type: ignore[override]
        """As `LayerNorm.forward`."""
        if x.is_nested:
            return over_rows(self.forward, "rms_norm", self.normalized_shape, x, residual)
        if not _fits(x, self.normalized_shape):
            return super().forward(x)
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        rows, residual_rows, weight, _ = _rows(self.normalized_shape, x, residual, self.weight, None)
        found = rms_norm(rows, weight, eps=eps, residual=residual_rows, rounding=self.rounding)
        return _shaped(found, x.shape)


def _fits(x: Tensor, normalized_shape: Sequence[int]) -> bool:
    return tuple(x.shape[-len(normalized_shape) :]) == tuple(normalized_shape)


def _rows(
    normalized_shape: Sequence[int], x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The normalised dimensions as one. Under CUDA's autocast norms are float32, as torch's are."""
    if residual is not None and residual.is_nested:
        fail("fastattn.nn", "residual", "a plain tensor, as x is", "a nested tensor")
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x, residual, weight, bias = (t if t is None else t.float() for t in (x, residual, weight, bias))  # type: ignore[assignment]
    if len(normalized_shape) > 1:
        x, residual = (t if t is None else t.flatten(-len(normalized_shape)) for t in (x, residual))  # type: ignore[assignment]
        weight, bias = (t if t is None else t.flatten() for t in (weight, bias))
    if x.stride(-1) != 1:
        x = x.contiguous()
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    return x, residual, weight, bias


def _shaped(found: Any, shape: torch.Size) -> Any:
    """A result or a pair of results in x's shape."""
    if isinstance(found, tuple):
        return tuple(t.reshape(shape) for t in found)
    return found.reshape(shape) if found.shape != shape else found
