"""Nested tensors as packed rows and back: [batch, (length), ...] <-> [total, ...] with cu_seqlens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastattn.ops._check import fail

Tensor = torch.Tensor


class Packed(NamedTuple):
    """The rows of a nested tensor, one sequence after the other, and where each begins."""

    rows: Tensor  # [total, ...]
    cu_seqlens: Tensor  # [batch + 1] int32
    longest: int
    nested: Any  # the tensor that was packed

    def unpack(self, rows: Tensor) -> Tensor:
        """Other rows in the same arrangement, as a nested tensor of the same layout."""
        if self.nested.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(rows, self.nested.offsets())
        return torch.nested.as_nested_tensor(list(rows.split(self.lengths())))

    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def padded(self, rows: Tensor) -> Tensor:
        """[batch, longest, ...], zeros after each sequence."""
        return torch.nn.utils.rnn.pad_sequence(list(rows.split(self.lengths())), batch_first=True)

    def present(self) -> Tensor:
        """bool [batch, longest], False after each sequence."""
        lengths = self.cu_seqlens.diff()
        return torch.arange(self.longest, device=lengths.device) < lengths[:, None]


def pack(nested: Any) -> Packed:
    """Differentiable; copies strided nested tensors, reads jagged ones where they lie."""
    if nested.layout == torch.jagged and nested.lengths() is None:
        rows, lengths = nested.values(), nested.offsets().diff().tolist()
    else:
        parts = nested.unbind()
        rows, lengths = torch.cat(parts), [part.shape[0] for part in parts]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(nested.device)
    return Packed(rows, cu_seqlens, max(lengths, default=0), nested)


def over_rows(norm: Callable[..., Any], op: str, normalized_shape: Sequence[int], x: Any, residual: Any = None) -> Any:
    """A norm of nested x, or of x + residual: its last dimensions, normalized_shape, must not be ragged."""
    trailing = x.dim() - len(normalized_shape)
    ragged = getattr(x, "_ragged_idx", 1)
    if trailing <= ragged:
        expected = f"a nested tensor that is ragged before its last {len(normalized_shape)} dimensions"
        fail(op, "x", expected, f"{x.dim()} dimensions, ragged in number {ragged}")
    if x.layout == torch.jagged:
        given = () if residual is None else (_values_like(op, residual, x),)
        found = norm(x.values(), *given)
        again = [torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths(), ragged) for y in _listed(found)]
    else:
        packed = pack(x)
        given = () if residual is None else (_rows_like(op, residual, packed),)
        found = norm(packed.rows, *given)
        again = [packed.unpack(y) for y in _listed(found)]
    return tuple(again) if isinstance(found, tuple) else again[0]


def _listed(found: Any) -> Sequence[Tensor]:
    return found if isinstance(found, tuple) else (found,)


def _values_like(op: str, residual: Any, x: Any) -> Tensor:
    if not residual.is_nested or residual.layout != torch.jagged:
        fail(op, "residual", "a nested tensor of the layout of x", _described(residual))
    if residual.shape != x.shape:
        fail(op, "residual", f"of the shape of x and with its offsets {tuple(x.shape)}", tuple(residual.shape))
    return residual.values()


def _rows_like(op: str, residual: Any, packed: Packed) -> Tensor:
    if not residual.is_nested or residual.layout != torch.strided:
        fail(op, "residual", "a nested tensor of the layout of x", _described(residual))
    other = pack(residual)
    if other.lengths() != packed.lengths() or other.rows.shape != packed.rows.shape:
        fail(op, "residual", f"of the lengths of x ({packed.lengths()})", other.lengths())
    return other.rows


def _described(t: Any) -> str:
    return f"a {t.layout} nested tensor" if t.is_nested else f"a plain tensor {tuple(t.shape)}"
