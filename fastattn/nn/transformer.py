"""TransformerEncoderLayer and TransformerDecoderLayer: torch's modules on fastattn's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.nn import _nested
from fastattn.nn._twin import twin_of
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm

Tensor = torch.Tensor
_PARTS: dict[type, Any] = {torch.nn.MultiheadAttention: MultiheadAttention, torch.nn.LayerNorm: LayerNorm}


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward network, each with a residual and a norm (arXiv:1706.03762).

    torch.nn.TransformerEncoderLayer with the same arguments, parameters, initialisation and results, in training and in
    eval; there is no second, fused path. Boolean masks stay boolean. Nested tensors work in training too: their rows
    are computed packed, without padding. `MultiheadAttention` says what differs for queries that see no key.

    >>> layer = fastattn.nn.TransformerEncoderLayer(512, 8, batch_first=True)
    >>> encoder = torch.nn.TransformerEncoder(layer, num_layers=6)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    @classmethod
    def from_torch(cls, module: torch.nn.TransformerEncoderLayer) -> TransformerEncoderLayer:
        """The same layer, parameters shared, computing on fastattn."""
        return _twin(cls, module)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src shaped as in `MultiheadAttention`; the masks and the hint are that module's attn_mask, key_padding_mask
        and is_causal. Returns a tensor like src."""
        if not src.is_nested:
            return self._layer(src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        if src_mask is not None or src_key_padding_mask is not None or is_causal:
            raise ValueError("TransformerEncoderLayer: masks must be None for nested tensors, got a mask")
        if not isinstance(self.self_attn, MultiheadAttention):
            kind = type(self.self_attn).__name__
            raise ValueError(f"TransformerEncoderLayer: self_attn must be fastattn's for nested tensors, got {kind}")
        attention, packed = self.self_attn, _nested.pack(src)

        def attend(x: Tensor) -> Tensor:
            return self.dropout1(attention.forward_packed(x, x, x, packed.cu_seqlens, max_seqlen_q=packed.longest))

        return packed.unpack(self._layer(packed.rows, attend))

    def _layer(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer around its attention, for any number of leading dimensions."""
        if self.norm_first:
            x, h = _add_norm(self.norm2, x, attend(self.norm1(x)))
            return x + self._ff_block(h)
        x = _norm_of_sum(self.norm1, x, attend(x))
        return _norm_of_sum(self.norm2, x, self._ff_block(x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to an encoder's memory and a feed-forward network (arXiv:1706.03762).

    torch.nn.TransformerDecoderLayer with the same arguments, parameters, initialisation and results.
    `MultiheadAttention` says what differs for queries that see no key.

    >>> layer = fastattn.nn.TransformerDecoderLayer(512, 8, batch_first=True)
    >>> decoder = torch.nn.TransformerDecoder(layer, num_layers=6)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    @classmethod
    def from_torch(cls, module: torch.nn.TransformerDecoderLayer) -> TransformerDecoderLayer:
        """The same layer, parameters shared, computing on fastattn."""
        return _twin(cls, module)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt and memory shaped as in `MultiheadAttention`; the masks and hints are that module's. Returns a tensor like
        tgt."""
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        cross = memory_mask, memory_key_padding_mask, memory_is_causal
        x = tgt
        if self.norm_first:
            x, h = _add_norm(self.norm2, x, self._sa_block(self.norm1(x), *own))
            x, h = _add_norm(self.norm3, x, self._mha_block(h, memory, *cross))
            return x + self._ff_block(h)
        x = _norm_of_sum(self.norm1, x, self._sa_block(x, *own))
        x = _norm_of_sum(self.norm2, x, self._mha_block(x, memory, *cross))
        return _norm_of_sum(self.norm3, x, self._ff_block(x))


def _add_norm(norm: torch.nn.Module, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """x + branch and its norm, in one pass when the norm is ours. Under autocast a branch may be of another dtype."""
    if isinstance(norm, LayerNorm) and x.dtype == branch.dtype:
        h, total = norm(branch, residual=x)
        return total, h
    total = x + branch
    return total, norm(total)


def _norm_of_sum(norm: torch.nn.Module, x: Tensor, branch: Tensor) -> Tensor:
    return _add_norm(norm, x, branch)[1]


def _adopt(layer: torch.nn.Module) -> None:
    """Attention and norms of torch's become ours, with the parameters that torch initialised."""
    for name, child in list(layer._modules.items()):
        if type(child) in _PARTS:
            layer._modules[name] = _PARTS[type(child)].from_torch(child)


def _twin(cls: type, module: torch.nn.Module) -> Any:
    twin = twin_of(cls, module)
    _adopt(twin)
    return twin
