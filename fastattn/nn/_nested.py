"""Nested tensors as packed rows and back: [batch, (length), ...] <-> [total, ...] with cu_seqlens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

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
