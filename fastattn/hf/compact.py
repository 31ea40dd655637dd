"""A mask that is a band, a padding row and packed sequences, and turns into the full matrix when anyone else looks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

Tensor = torch.Tensor


class Pattern(NamedTuple):
    """Which pairs of positions see each other: q - left <= k <= q + right (None is unbounded), same segment.

    segments [batch, seqlen]: a number per token, equal for the tokens of one packed sequence, None when there is one.
    """

    left: int | None = None
    right: int | None = None
    segments: Tensor | None = None


class Packed(NamedTuple):
    """Packed sequences of a flattened batch: cu_seqlens [sequences + 1] int32 and the longest one."""

    cu_seqlens: Tensor
    max_seqlen: int


class CompactMask(torch.Tensor):
    """Looks like the boolean mask [batch, 1, seqlen_q, seqlen_k] (True = may attend) but stores only what makes it.

    pattern  band and segments
    shift    position of query 0 minus position of key 0
    padding  [batch, seqlen_k] bool, True = a token, or None

    Every operation on it, slicing and casting included, computes on the full matrix and returns plain tensors; so a
    model that edits its mask gets what it would have got, and one that hands it on leaves it compact.
    """

    pattern: Pattern
    shift: int
    padding: Tensor | None
    _packed: Packed | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, batch: int, seqlen_q: int, seqlen_k: int, pattern: Pattern, shift: int, padding: Tensor | None, device: Any
    ) -> CompactMask:
        self = torch.Tensor._make_wrapper_subclass(
            cls, (batch, 1, seqlen_q, seqlen_k), dtype=torch.bool, device=torch.device(device)
        )
        self.pattern, self.shift, self.padding, self._packed = pattern, shift, padding, None
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0].copy()
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype", torch.bool) == torch.bool:
            return args[0].copy((kwargs or {}).get("device"))
        args, kwargs = tree_map_only(CompactMask, CompactMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        padding = "None" if self.padding is None else f"[{self.shape[0]}, {self.shape[3]}]"
        band = f"left={self.pattern.left}, right={self.pattern.right}, shift={self.shift}"
        return (
            f"CompactMask({tuple(self.shape)}, {band}, packed={self.pattern.segments is not None}, padding={padding})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactMask:
        return self.copy()

    def copy(self, device: Any = None) -> CompactMask:
        """One of its own, on that device or the same."""
        device = self.device if device is None else torch.device(device)
        segments = self.pattern.segments
        pattern = self.pattern._replace(segments=None if segments is None else segments.to(device))
        padding = None if self.padding is None else self.padding.to(device)
        batch, _, seqlen_q, seqlen_k = self.shape
        return CompactMask(batch, seqlen_q, seqlen_k, pattern, self.shift, padding, device)

    def dense(self) -> Tensor:
        """The plain boolean tensor [batch, 1, seqlen_q, seqlen_k]."""
        batch, _, seqlen_q, seqlen_k = self.shape
        rows = torch.arange(seqlen_q, device=self.device)[:, None] + self.shift
        columns = torch.arange(seqlen_k, device=self.device)
        visible = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool, device=self.device)
        if self.pattern.left is not None:
            visible = visible & (columns >= rows - self.pattern.left)
        if self.pattern.right is not None:
            visible = visible & (columns <= rows + self.pattern.right)
        if self.pattern.segments is not None:
            segments = self.pattern.segments
            visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, :]
        return visible.expand(batch, 1, seqlen_q, seqlen_k)

    def packed(self) -> Packed | None:
        """The packed sequences, None when the pattern has no segments."""
        if self._packed is None and self.pattern.segments is not None:
            self._packed = pack(self.pattern.segments)
        return self._packed


def pack(segments: Tensor) -> Packed:
    """[batch, seqlen] segment numbers -> the sequences of the flattened batch; a row of the batch always starts one."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([first, first.new_tensor([segments.numel()])])
    return Packed(cu_seqlens.int(), int((cu_seqlens[1:] - cu_seqlens[:-1]).max()))


def segments_of(position_ids: Tensor) -> Tensor:
    """Packed sequences start where a position is not one more than the position before: [batch, seqlen] -> likewise."""
    breaks = torch.zeros_like(position_ids, dtype=torch.int32)
    breaks[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return breaks.cumsum(-1)
