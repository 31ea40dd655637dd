"""Every operation with every option once, small: what `verify` measures and what the support matrix asks about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Call = Callable[..., Any]


@dataclass(frozen=True)
class Scenario:
    """One operation with one option.

    op, option   as the tables name them
    tensors      float32 inputs, cast to the dtype under test; those named in `leaves` get gradients
    call         call(ops, tensors) -> named results; `ops` is fastattn or fastattn.reference
    sdpa         the same results by torch's SDPA, or None where it cannot express the option
    """

    op: str
    option: str
    tensors: dict[str, Tensor]
    call: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
    leaves: tuple[str, ...] = ()
    sdpa: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    keep: frozenset[str] = field(default_factory=frozenset)  # tensors that stay float32 in every dtype but float64


def _randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _qkv(batch=2, seqlen_q=113, seqlen_k=203, nheads=4, nheads_k=4, headdim=64, headdim_v=0) -> dict[str, Tensor]:
    return {
        "q": _randn(batch, seqlen_q, nheads, headdim, seed=0),
        "k": _randn(batch, seqlen_k, nheads_k, headdim, seed=1),
        "v": _randn(batch, seqlen_k, nheads_k, headdim_v or headdim, seed=2),
    }


def attention() -> list[Scenario]:
    found = [
        _attention("dense", sdpa={}),
        _attention("causal", _qkv(seqlen_q=203), sdpa={"is_causal": True}, causal=True),
        _attention("causal, more keys", causal=True),
        _attention("causal upper left", sdpa={"is_causal": True}, causal="upper_left"),
        _attention("grouped heads", _qkv(nheads=8, nheads_k=2), sdpa={"enable_gqa": True}),
        _attention("value dim", _qkv(headdim=96, headdim_v=64)),
        *(_attention(f"headdim {d}", _qkv(headdim=d), sdpa={}) for d in (8, 40, 59, 80, 96, 128, 256)),
        _attention("scale", sdpa={"scale": 0.3}, scale=0.3),
        _attention("window", window=(64, 16)),
        _attention("window, causal", window=(40, 0), causal=True),
        _attention("softcap", softcap=5.0),
        _attention("mask", mask=_mask(2, 1, 113, 203)),
        _attention("padding mask", sdpa={"attn_mask": _padding()}, mask=_padding()),
        _attention("bias", extra={"bias": _randn(1, 4, 113, 203, seed=3)}),
        _attention("alibi", causal=True, alibi_slopes=2.0 ** -torch.arange(1.0, 5.0)),
        _attention("sinks", extra={"sinks": _randn(4, seed=4)}),
        _attention("dropout", dropout_p=0.2),
        _packed("packed", False),
        _packed("packed, causal", True),
    ]
    return found


def _mask(*size: int) -> Tensor:
    mask = _randn(*size, seed=5) > 0.5
    mask[..., 7, :] = False  # a query that sees no key
    return mask


def _padding() -> Tensor:
    return (torch.arange(203) < torch.tensor([203, 77])[:, None])[:, None, None]


def _attention(
    option: str,
    tensors: dict[str, Tensor] | None = None,
    *,
    extra: dict[str, Tensor] | None = None,
    sdpa: dict[str, Any] | None = None,
    **options: Any,
) -> Scenario:
    tensors = (tensors or _qkv()) | (extra or {})
    differentiable = ("q", "k", "v", *(extra or {}))

    def call(ops: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # dropout draws the same bits everywhere
        given = {name: t[name] for name in extra or {}}
        o, lse = ops.attention(t["q"], t["k"], t["v"], return_lse=True, **given, **options)
        return {"o": o, "lse": lse}

    def by_torch(t: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        return {"o": F.scaled_dot_product_attention(q, k, v, **(sdpa or {})).transpose(1, 2)}

    return Scenario("attention", option, tensors, call, differentiable, None if sdpa is None else by_torch)


def _packed(option: str, causal: bool) -> Scenario:
    bounds = torch.tensor([0, 100, 101, 101, 203], dtype=torch.int32)
    tensors = {name: x[0] for name, x in _qkv(batch=1, seqlen_q=203).items()}

    def call(ops: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        o, lse = ops.attention(t["q"], t["k"], t["v"], cu_seqlens_q=bounds, causal=causal, return_lse=True)
        return {"o": o, "lse": lse}

    return Scenario("attention", option, tensors, call, ("q", "k", "v"))


def attention_kvcache() -> list[Scenario]:
    decode = partial(_qkv, batch=3, seqlen_q=1, seqlen_k=512, nheads=8, nheads_k=2)
    new = {"k_new": _randn(3, 2, 2, 64, seed=6), "v_new": _randn(3, 2, 2, 64, seed=7)}
    cos, sin = _tables(600, 64)
    paged = {"q": decode()["q"], "k": _randn(24, 64, 2, 64, seed=8), "v": _randn(24, 64, 2, 64, seed=9)}
    table = torch.randperm(24, generator=torch.Generator().manual_seed(0)).int().view(3, 8)
    return [
        _kvcache("one token", decode()),
        _kvcache("append", _qkv(3, 2, 512, 8, 2) | new),
        _kvcache("append, rope", _qkv(3, 2, 512, 8, 2) | new | {"cos": cos, "sin": sin}),
        _kvcache("paged", paged, block_table=table),
        _kvcache("splits", decode(), num_splits=4),
        _kvcache("window", decode(), window=(128, 0)),
    ]


def _kvcache(option: str, tensors: dict[str, Tensor], **options: Any) -> Scenario:
    lengths = torch.tensor([510, 1, 77], dtype=torch.int32)

    def call(ops: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        caches = t["k"].clone(), t["v"].clone()  # appending writes into them
        given = {
            name: t[key] for name, key in (("k", "k_new"), ("v", "v_new"), ("cos", "cos"), ("sin", "sin")) if key in t
        }
        o, lse = ops.attention_kvcache(t["q"], *caches, lengths, return_lse=True, **given, **options)
        return {"o": o, "lse": lse, "k_cache": caches[0], "v_cache": caches[1]}

    return Scenario("attention_kvcache", option, tensors, call, keep=frozenset({"cos", "sin"}))


def attention_weights() -> list[Scenario]:
    def call(ops: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        lse = t["lse"].double() if t["q"].dtype == torch.float64 else t["lse"]
        return {"weights": ops.attention_weights(t["q"], t["k"], lse)}

    tensors = {name: x for name, x in _qkv().items() if name != "v"}
    scores = torch.einsum("bmhd,bnhd->bhmn", tensors["q"].double(), tensors["k"].double()) / 8
    tensors["lse"] = scores.logsumexp(-1).float()
    return [Scenario("attention_weights", "dense", tensors, call, ("q", "k", "lse"), keep=frozenset({"lse"}))]


def merge_attention() -> list[Scenario]:
    def call(ops: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        o, lse = ops.merge_attention(t["o_a"], t["lse_a"], t["o_b"], t["lse_b"])
        return {"o": o, "lse": lse}

    tensors = {f"o_{part}": _randn(2, 50, 4, 64, seed=i) for i, part in enumerate("ab")}
    tensors |= {f"lse_{part}": _randn(2, 4, 50, seed=2 + i) for i, part in enumerate("ab")}
    tensors["lse_b"][0, :, 3] = float("-inf")
    return [Scenario("merge_attention", "dense", tensors, call, ("o_a", "o_b"), keep=frozenset({"lse_a", "lse_b"}))]


def layer_norm() -> list[Scenario]:
    options: dict[str, tuple[str, ...]] = {
        "weight, bias": ("weight", "bias"),
        "plain": (),
        "residual": ("weight", "bias", "residual"),
    }
    return [_norm("layer_norm", option, names) for option, names in options.items()]


def rms_norm() -> list[Scenario]:
    return [
        _norm("rms_norm", "llama", ("weight",)),
        _norm("rms_norm", "last", ("weight",), rounding="last"),
        _norm("rms_norm", "gemma", ("weight",), rounding="gemma"),
        _norm("rms_norm", "weight offset", ("weight",), weight_offset=1.0),
        _norm("rms_norm", "residual", ("weight", "residual")),
        _norm("rms_norm", "fp32 weight", ("weight",), keep=frozenset({"weight"})),
    ]


def _norm(op: str, option: str, names: tuple[str, ...], keep: frozenset[str] = frozenset(), **options: Any) -> Scenario:
    sizes = {"x": (37, 768), "weight": (768,), "bias": (768,), "residual": (37, 768)}
    tensors = {name: _randn(*sizes[name], seed=i) for i, name in enumerate(("x", *names))}

    def call(ops: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        out = getattr(ops, op)(t["x"], **{name: t[name] for name in names}, **options)
        return dict(zip(("y", "sum"), out, strict=True)) if "residual" in names else {"y": out}

    return Scenario(op, option, tensors, call, ("x", *names), keep=keep)


def _tables(seqlen: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    from fastattn.ops.rope import tables

    cos, sin = tables.plain(seqlen, rotary_dim)
    return cos.float(), sin.float()


def rope() -> list[Scenario]:
    positions = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
    return [
        _rope("half-split", 64),
        _rope("interleaved", 64, interleaved=True),
        _rope("partial", 32),
        _rope("position_ids", 64, position_ids=positions),
    ]


def _rope(option: str, rotary_dim: int, **options: Any) -> Scenario:
    cos, sin = _tables(64, rotary_dim)
    tensors = {"q": _randn(2, 33, 4, 64, seed=0), "k": _randn(2, 33, 2, 64, seed=1), "cos": cos, "sin": sin}

    def call(ops: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(
            zip(("q_rotated", "k_rotated"), ops.rope_qk(t["q"], t["k"], t["cos"], t["sin"], **options), strict=True)
        )

    return Scenario("rope", option, tensors, call, ("q", "k"), keep=frozenset({"cos", "sin"}))


OPS: dict[str, Callable[[], list[Scenario]]] = {
    "attention": attention,
    "attention_kvcache": attention_kvcache,
    "attention_weights": attention_weights,
    "merge_attention": merge_attention,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "rope": rope,
}


def cast(scenario: Scenario, dtype: torch.dtype, wide: bool = False) -> dict[str, Tensor]:
    """The inputs in `dtype`; `wide` gives the same (rounded) numbers in float64, for the truth."""
    found = {}
    for name, tensor in scenario.tensors.items():
        rounded = tensor if name in scenario.keep else tensor.to(dtype)
        found[name] = (rounded.double() if wide else rounded.clone()).requires_grad_(name in scenario.leaves)
    return found


class Placed:
    """`ops` with every call made on `device`: arguments go there and results come back, with their gradients."""

    def __init__(self, ops: Any, device: str) -> None:
        self._ops, self._device = ops, device

    def __getattr__(self, name: str) -> Call:
        function = getattr(self._ops, name)

        def call(*args: Any, **options: Any) -> Any:
            given = [*args, *options.values()]
            there = [x.to(self._device) if isinstance(x, Tensor) else x for x in given]
            found = function(*there[: len(args)], **dict(zip(options, there[len(args) :], strict=True)))
            if name == "attention_kvcache":  # it appends to the caches in place
                for here, moved in zip(given[1:3], there[1:3], strict=True):
                    here.copy_(moved)
            return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

        return call
