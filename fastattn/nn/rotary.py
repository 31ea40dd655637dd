"""RotaryEmbedding: the tables of a model's RoPE, kept, grown and applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastattn.ops._check import fail
from fastattn.ops._dispatch import UnsupportedError
from fastattn.ops.rope import rope_qk, tables

Tensor = torch.Tensor
_OP = "RotaryEmbedding"
_Builder = Callable[..., tables.Tables]  # (rows, device=)


class RotaryEmbedding(torch.nn.Module):
    """Rotate q and k by their positions (arXiv:2104.09864), with every scaling of the context that transformers knows.

    headdim      of q and k
    theta        the base of the frequencies
    rotary_dim   how many elements of a head turn, the first ones; None is headdim
    interleaved  pairs (2i, 2i + 1) instead of halves
    max_seqlen   the longest sequence that the model was made for; the tables grow beyond
    scaling      None, or a mapping with the keys of transformers' `rope_parameters`: rope_type, one of "default",
                 "linear", "dynamic", "yarn", "llama3", "longrope", "proportional", and its factors. rope_theta and
                 partial_rotary_factor in it override theta and rotary_dim

    The tables are float32 in any model and on any device. "dynamic" and "longrope" depend on the length of the sequence:
    that of each call, where transformers' "dynamic" remembers the longest one.
    Raises ValueError when an argument is wrong, UnsupportedError for a rope_type that it does not know.

    >>> rotary = fastattn.nn.RotaryEmbedding(128, scaling={"rope_type": "linear", "factor": 2.0})
    >>> q, k = rotary(q, k)
    """

    def __init__(
        self,
        headdim: int,
        *,
        theta: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        max_seqlen: int = 2048,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        scaling = dict(scaling or {})
        self.kind: str = scaling.get("rope_type", "default")
        self.theta: float = scaling.get("rope_theta") or theta
        part = scaling.get("partial_rotary_factor") or 1.0
        if rotary_dim is None:
            rotary_dim = headdim if self.kind == "proportional" else int(headdim * part)
        self.headdim, self.rotary_dim, self.interleaved, self.max_seqlen = headdim, rotary_dim, interleaved, max_seqlen
        self.original_seqlen: int = scaling.get("original_max_position_embeddings") or max_seqlen
        self._scaling = scaling
        self._kept: dict[tuple[str, bool], tables.Tables] = {}
        self.tables(max_seqlen)  # wrong parameters show here

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None, **options: Any) -> RotaryEmbedding:
        """The RoPE of a transformers config; layer_type chooses in models whose layers differ.

        >>> rotary = fastattn.nn.RotaryEmbedding.from_config(model.config)
        """
        config.standardize_rope_params()
        parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        headdim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(headdim, max_seqlen=config.max_position_embeddings, scaling=parameters, **options)

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None = None, *, seqlen: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [batch, seqlen, nheads, headdim] and k [batch, seqlen, nheads_k, headdim], rotated.

        position_ids  [batch, seqlen] or [seqlen]; None counts from 0
        seqlen        largest position + 1; None reads it off position_ids, which waits for a GPU
        """
        for name, x in (("q", q), ("k", k)):
            if x.is_nested:
                fail(
                    _OP, name, "a plain tensor (MultiheadAttention rotates the rows of nested ones)", "a nested tensor"
                )
        if seqlen is None:
            seqlen = q.shape[-3] if position_ids is None else int(position_ids.max()) + 1
        cos, sin = self.tables(seqlen, q.device)
        return rope_qk(q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids)

    def tables(self, seqlen: int, device: torch.device | str | None = None) -> tables.Tables:
        """cos and sin [rows, rotary_dim / 2] float32 with rows >= seqlen, as a sequence of that length needs them."""
        device = torch.device("cpu") if device is None else torch.device(device)
        limit = {"dynamic": self.max_seqlen, "longrope": self.original_seqlen}.get(self.kind)
        beyond = limit is not None and seqlen > limit
        kept = self._kept.get((str(device), beyond))
        exact = self.kind == "dynamic" and beyond  # a base of its own for every length
        if kept is not None and (kept[0].shape[0] == seqlen if exact else kept[0].shape[0] >= seqlen):
            return kept
        rows = seqlen
        if not exact:
            rows = max(seqlen, self.max_seqlen, 2 * kept[0].shape[0] if kept is not None else 0)
            rows = rows if limit is None or beyond else limit
        found = self._builder()(rows, device=device)
        self._kept[str(device), beyond] = found
        return found

    def _builder(self) -> _Builder:
        make = _KINDS.get(self.kind)
        if make is None:
            raise UnsupportedError(f"{_OP}: rope_type must be one of {sorted(_KINDS)}, got {self.kind!r}")
        return make(self)

    def _parameter(self, name: str, default: Any = None) -> Any:
        """Of the scaling; an error without one and without a default."""
        found = self._scaling.get(name)
        found = default if found is None else found
        if found is None:
            fail(_OP, f"scaling[{name!r}]", f"given with rope_type {self.kind!r}", None)
        return found

    def _factor(self) -> float:
        """Given, or how far the model's longest sequence exceeds the original one (DeepSeek, Phi)."""
        return self._parameter("factor", self.max_seqlen / self.original_seqlen)

    def extra_repr(self) -> str:
        return f"{self.headdim}, theta={self.theta}, rotary_dim={self.rotary_dim}, rope_type={self.kind!r}"


def _with(rotary: RotaryEmbedding, build: Callable[..., tables.Tables], **parameters: Any) -> _Builder:
    def built(rows: int, device: torch.device) -> tables.Tables:
        return build(rows, rotary.rotary_dim, theta=rotary.theta, device=device, **parameters)

    return built


def _yarn(r: RotaryEmbedding) -> _Builder:
    optional: dict[str, Any] = {name: r._scaling.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
    return _with(
        r,
        tables.yarn,
        factor=r._factor(),
        original_seqlen=r.original_seqlen,
        beta_fast=r._parameter("beta_fast", 32.0),
        beta_slow=r._parameter("beta_slow", 1.0),
        truncate=r._parameter("truncate", True),
        **optional,
    )


def _longrope(r: RotaryEmbedding) -> _Builder:
    return _with(
        r,
        tables.longrope,
        factor=r._factor(),
        original_seqlen=r.original_seqlen,
        attention_factor=r._scaling.get("attention_factor"),
        short_factor=r._parameter("short_factor"),
        long_factor=r._parameter("long_factor"),
    )


def _llama3(r: RotaryEmbedding) -> _Builder:
    return _with(
        r,
        tables.llama3,
        factor=r._parameter("factor"),
        original_seqlen=r.original_seqlen,
        low_freq_factor=r._parameter("low_freq_factor"),
        high_freq_factor=r._parameter("high_freq_factor"),
    )


def _proportional(r: RotaryEmbedding) -> _Builder:
    """Frequencies as for the whole head, but only the first part of the pairs turns (Gemma 4)."""
    turning = int(r._parameter("partial_rotary_factor", 1.0) * r.headdim // 2)

    def built(rows: int, device: torch.device) -> tables.Tables:
        cos, sin = _with(r, tables.linear, factor=r._parameter("factor", 1.0))(rows, device=device)
        cos[:, turning:], sin[:, turning:] = 1.0, 0.0
        return cos, sin

    return built


_KINDS: dict[str, Callable[[RotaryEmbedding], _Builder]] = {
    "default": lambda r: _with(r, tables.plain),
    "linear": lambda r: _with(r, tables.linear, factor=r._parameter("factor")),
    "dynamic": lambda r: _with(r, tables.dynamic_ntk, factor=r._parameter("factor"), max_seqlen=r.max_seqlen),
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
