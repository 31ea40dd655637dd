"""MultiheadAttention: torch's module on fastattn's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F

from fastattn.nn import _nested
from fastattn.nn._twin import twin_of
from fastattn.ops.attention import _philox, attention, attention_weights
from fastattn.ops.attention.op import attention_fwd

Tensor = torch.Tensor
_OP = "MultiheadAttention"


class _Visible(NamedTuple):
    """Who may see whom, in `fastattn.attention`'s words and no larger than the user's own masks."""

    causal: bool | str = False
    mask: Tensor | None = None
    bias: Tensor | None = None


def _keep_torch_off(module: torch.nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing. torch.nn.TransformerEncoderLayer's fused inference path reads the weights of its
    self_attn and never calls it, unless a hook is there."""


class MultiheadAttention(torch.nn.MultiheadAttention):
    """MultiHead(Q, K, V) = concat(head_1, ..., head_h) Wᵒ, head_i = attention(Q W_iᑫ, K W_iᵏ, V W_iᵛ) (arXiv:1706.03762).

    torch.nn.MultiheadAttention with the same arguments, parameters, initialisation, mask conventions (bool True =
    ignore) and results, in training and in eval. What differs:

    a query that sees no key  gives out_proj(0), weights 0 and no gradient; torch gives NaN on most of its paths
    nested tensors            work in training and with the jagged layout too; masks besides are refused
    masks                     key_padding_mask and attn_mask are never expanded over heads and queries
    need_weights=False        makes no weights; True computes them beside the output (attention_weights)
    dropout                   drops other elements than torch does with the same seed

    >>> attention = fastattn.nn.MultiheadAttention(512, 8, batch_first=True)
    >>> y, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_forward_hook(_keep_torch_off)

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention) -> MultiheadAttention:
        """The same module, parameters and hooks shared, computing on fastattn.

        >>> layer.self_attn = fastattn.nn.MultiheadAttention.from_torch(layer.self_attn)
        """
        twin = twin_of(cls, module)
        if _keep_torch_off not in twin._forward_hooks.values():
            twin.register_forward_hook(_keep_torch_off)
        return twin

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value.

        query, key, value  [seqlen, batch, features] ([batch, seqlen, features] with batch_first), or [seqlen, features],
                           or nested tensors
        key_padding_mask   [batch, seqlen_k] ([seqlen_k] unbatched): bool, True = ignore the key; or added to the scores
        need_weights       return the weights as well; they cost their memory
        attn_mask          [seqlen_q, seqlen_k] or [batch * num_heads, seqlen_q, seqlen_k]: bool, True = may not attend; or
                           added to the scores, with a gradient if it wants one
        average_attn_weights  [batch, seqlen_q, seqlen_k] instead of [batch, num_heads, seqlen_q, seqlen_k]
        is_causal          says that attn_mask, which must be given, is the causal mask. As in torch, the mask's values
                           count when weights are wanted or there is a key_padding_mask, otherwise the hint does

        Returns the output, shaped as query, and the weights (after dropout) or None.
        Raises what torch raises for shapes and types that do not fit, ValueError for the rest.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None or is_causal:
                _refuse("key_padding_mask and attn_mask", "None for nested tensors, whose lengths say it", "a mask")
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        masks = key_padding_mask, attn_mask
        batched = F._mha_shape_check(query, key, value, *masks, self.num_heads)  # type: ignore[attr-defined]
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if k.shape[:2] != v.shape[:2] or k.shape[0] != q.shape[0]:
            expected = "of the batch size of query and of the same length"
            _refuse("key and value", expected, f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
        hint = is_causal and key_padding_mask is None and not need_weights
        if is_causal and attn_mask is None:
            raise RuntimeError(f"{_OP}: attn_mask must be given with the is_causal hint, got None")
        visible = _Visible("upper_left") if hint else self._visible(q, k, key_padding_mask, attn_mask)
        k, v = self._append(k, v)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            o, weights = _attend_with_weights(q, k, v, visible, dropout_p)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            o = attention(q, k, v, **visible._asdict(), dropout_p=dropout_p)
        o = o.flatten(-2)
        if not batched:
            return self._out(o[0]), None if weights is None else weights[0]
        return self._out(o if self.batch_first else o.transpose(0, 1).contiguous()), weights

    def forward_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        causal: bool = False,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """`forward` without padding: sequence i is rows cu_seqlens[i] : cu_seqlens[i + 1] of [total, features].

        query, key, value           [total, features]
        cu_seqlens_q, cu_seqlens_k  [batch + 1] int32; None for k is that of q
        causal                      query m of a sequence sees its keys n <= m + seqlen_k - seqlen_q
        max_seqlen_q, max_seqlen_k  bounds of the lengths, computed when None

        Returns [total_q, embed_dim]. Raises ValueError with add_bias_kv and add_zero_attn.

        >>> y = attention.forward_packed(x, x, x, cu_seqlens)
        """
        if self.bias_k is not None or self.add_zero_attn:
            _refuse("add_bias_kv and add_zero_attn", "False for packed and nested sequences", True)
        q, k, v = self._project(query, key, value)
        o = attention(
            *(q, k, v),
            causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
        )
        return self._out(o.flatten(-2))

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not (query.is_nested and key.is_nested and value.is_nested):
            _refuse("query, key and value", "all nested when one is", "a mixture")
        q = _nested.pack(query)
        k = q if key is query else _nested.pack(key)
        v = k if value is key else _nested.pack(value)
        if not need_weights:
            longest: dict[str, Any] = {"max_seqlen_q": q.longest, "max_seqlen_k": k.longest}
            return q.unpack(self.forward_packed(q.rows, k.rows, v.rows, q.cu_seqlens, k.cu_seqlens, **longest)), None
        if self.bias_k is not None or self.add_zero_attn:
            _refuse("add_bias_kv and add_zero_attn", "False for packed and nested sequences", True)
        projected = self._project(q.rows, k.rows, v.rows)
        q_heads, k_heads, v_heads = (p.padded(x) for p, x in zip((q, k, v), projected, strict=True))
        # As torch: the weights come padded, 0 for rows and columns beyond the sequences.
        pairs = q.present()[:, None, :, None] & k.present()[:, None, None, :]
        dropout_p = self.dropout if self.training else 0.0
        o, weights = _attend_with_weights(q_heads, k_heads, v_heads, _Visible(mask=pairs), dropout_p)
        out = q.unpack(self._out(o.flatten(-2)[q.present()]))
        return out, weights.mean(dim=1) if average else weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., num_heads, head_dim] of each; views of one product where inputs are the same tensor."""
        self._check_features(query, key, value)
        shape, bias = (self.num_heads, self.head_dim), self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).unflatten(-1, (3, *shape)).unbind(-3)
            return q, k, v
        elif key is value:
            split = [self.embed_dim, 2 * self.embed_dim]
            weight_q, weight_kv = self.in_proj_weight.split(split)
            bias_q, bias_kv = (None, None) if bias is None else bias.split(split)
            k, v = F.linear(key, weight_kv, bias_kv).unflatten(-1, (2, *shape)).unbind(-3)
            return F.linear(query, weight_q, bias_q).unflatten(-1, shape), k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        q, k, v = (F.linear(x, w, b).unflatten(-1, shape) for x, w, b in zip(inputs, weights, biases, strict=True))
        return q, k, v

    def _check_features(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """torch raises AssertionError here."""
        for name, x, features in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.shape[-1] != features:
                raise AssertionError(f"{_OP}: {name} must be of {features} features, got {x.shape[-1]}")

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [batch, seqlen_k, num_heads, head_dim] with what add_bias_kv and add_zero_attn put at their end."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = _with_row(k, self.bias_k), _with_row(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        return k, v

    def _visible(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> _Visible:
        """The masks of a call; k is without the appended keys, which everybody sees."""
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        appended = (self.bias_k is not None) + self.add_zero_attn
        if attn_mask is not None:
            _check_kind("attn_mask", attn_mask)
            expected: tuple[Any, ...] = (seqlen_q, seqlen_k)
            if attn_mask.dim() == 3:
                expected = (batch * self.num_heads, *expected)
            if tuple(attn_mask.shape) != expected:
                raise RuntimeError(f"{_OP}: attn_mask must be of shape {expected}, got {tuple(attn_mask.shape)}")
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
            attn_mask = F.pad(attn_mask, (0, appended)) if appended else attn_mask
        if key_padding_mask is not None:
            _check_kind("key_padding_mask", key_padding_mask)
            if key_padding_mask.shape != (batch, seqlen_k):  # torch raises AssertionError here
                fact = tuple(key_padding_mask.shape)
                raise AssertionError(f"{_OP}: key_padding_mask must be of shape {(batch, seqlen_k)}, got {fact}")
            key_padding_mask = F.pad(key_padding_mask, (0, appended)) if appended else key_padding_mask
            key_padding_mask = key_padding_mask[:, None, None, :]
        return _combine(key_padding_mask, attn_mask, q.dtype)

    def _out(self, o: Tensor) -> Tensor:
        return F.linear(o, self.out_proj.weight, self.out_proj.bias)


def _combine(padding: Tensor | None, pairs: Tensor | None, dtype: torch.dtype) -> _Visible:
    """padding [batch, 1, 1, seqlen_k] and pairs [seqlen_q, seqlen_k] or [batch, num_heads, seqlen_q, seqlen_k] as a mask
    and a bias, neither larger than the larger of the two, except that two floating masks must be added."""
    found: dict[str, Tensor] = {}
    for given in (pairs, padding):
        if given is None:
            continue
        name = "mask" if given.dtype == torch.bool else "bias"
        visible = ~given if name == "mask" else given
        if name not in found:
            found[name] = visible
        elif name == "bias":
            found[name] = found[name] + visible
        elif pairs is not None and pairs.dim() == 4:
            found[name] = found[name] & visible
        else:
            found["bias"] = torch.zeros_like(given, dtype=dtype).masked_fill(given, float("-inf"))
    return _Visible(False, found.get("mask"), found.get("bias"))


def _attend_with_weights(q: Tensor, k: Tensor, v: Tensor, visible: _Visible, dropout_p: float) -> tuple[Tensor, Tensor]:
    """o, and the weights [batch, num_heads, seqlen_q, seqlen_k] that made it, after dropout."""
    options = visible._asdict()
    if not dropout_p:
        o, lse = attention(q, k, v, **options, return_lse=True)
        return o, attention_weights(q, k, lse, **options)
    philox = _philox.draw(q.device)
    o, lse = attention_fwd(
        q, k, v, visible.mask, visible.bias, None, None, None, None, philox, None, None, None, None, False, None, None,
        dropout_p, None, None,
    )  # fmt: skip
    weights = attention_weights(q, k, lse, **options)
    keep = _philox.keep_mask(philox, dropout_p, 0, *weights.shape)
    return o, weights * keep / (1.0 - dropout_p)


def _with_row(t: Tensor, row: Tensor) -> Tensor:
    """t [batch, seqlen, num_heads, head_dim] and, at its end, row [1, 1, num_heads * head_dim] in every sequence."""
    end = row.to(t.dtype).unflatten(-1, t.shape[2:]).expand(t.shape[0], -1, -1, -1)
    return torch.cat([t, end], dim=1)


def _check_kind(name: str, mask: Tensor) -> None:
    """torch raises AssertionError here."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"{_OP}: {name} must be boolean or floating, got {mask.dtype}")


def _refuse(argument: str, expectation: str, fact: Any) -> NoReturn:
    raise ValueError(f"{_OP}: {argument} must be {expectation}, got {fact}")
