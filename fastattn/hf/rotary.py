"""Swap the rotary function of one attention module: which kind it is, found by running it, and the forward with ours.

A modeling file calls a function of its module, `apply_rotary_pos_emb`, that all models of the file share. One instance
gets its own forward: the same code, looking its names up in a copy of the module's dictionary where that one differs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fastattn

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]


def replacement(module: nn.Module, halves_agree: str | None) -> tuple[Callable[..., Any] | None, str] | None:
    """(forward, what it is) for a module that rotates q and k, (None, why not), or None when it does not rotate.

    halves_agree: None when the two halves of the model's cos and sin tables are equal, else the reason for doubt.
    """
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None:
        return None
    names = [n for n in _names(forward) if callable(forward.__globals__.get(n))]
    if not names:
        return None
    if hasattr(forward, "__wrapped__"):
        return None, "its forward is wrapped by a decorator"
    swapped, kinds = {}, []
    for name in names:
        function = forward.__globals__[name]
        kind = recognise(function)
        if kind is None:
            return None, f"{name} is no rotation that fastattn.rope_qk knows"
        if kind in ("half-split", "deinterleaved", "interleaved, full tables") and halves_agree is not None:
            return None, halves_agree
        swapped[name] = functools.partial(_KINDS[kind], function)
        kinds.append(kind)
    scope = {k: v for k, v in forward.__globals__.items() if k != "__name__"} | swapped  # nameless: no module's own
    own = types.FunctionType(code, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__, own.__module__, own.__qualname__ = forward.__kwdefaults__, __name__, forward.__qualname__
    return functools.partial(own, module), f"fastattn.rope_qk, {' or '.join(dict.fromkeys(kinds))}"


def _names(forward: Callable[..., Any]) -> Iterator[str]:
    for name in forward.__code__.co_names:
        if name.startswith(("apply_rotary", "rotate_")) and name != "rotate_half":
            yield name


def half_split(original: Callable[..., Pair], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **more: Any) -> Pair:
    """Tables whose two halves are equal; element i is paired with i + half."""
    half = cos.shape[-1] // 2
    return _rotate(original, q, k, cos, sin, half, False, more)


def half_tables(original: Callable[..., Pair], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **more: Any) -> Pair:
    """Tables of half the width (GPT-OSS); element i is paired with i + half."""
    return _rotate(original, q, k, cos, sin, cos.shape[-1], False, more)


def interleaved(original: Callable[..., Pair], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **more: Any) -> Pair:
    """Tables whose two halves are equal; element 2i is paired with 2i + 1 and stays there (GLM)."""
    return _rotate(original, q, k, cos, sin, cos.shape[-1] // 2, True, more)


def deinterleaved(original: Callable[..., Pair], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **more: Any) -> Pair:
    """As `interleaved`, then the even elements first, the odd ones after them (DeepSeek-V3)."""
    rotated = _rotate(original, q, k, cos, sin, cos.shape[-1] // 2, True, more)
    if rotated[0].dtype != q.dtype or not _serves(q, k, cos, more):
        return rotated
    return _evens_first(rotated[0]), _evens_first(rotated[1])


def complex_table(original: Callable[..., Pair], q: Tensor, k: Tensor, freqs: Tensor, **more: Any) -> Pair:
    """One complex table (DeepSeek-V2); element 2i is paired with 2i + 1."""
    if more:
        return original(q, k, freqs, **more)
    cos, sin = freqs.real.contiguous(), freqs.imag.contiguous()
    a, b = fastattn.rope_qk(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=True)
    return a.transpose(1, 2), b.transpose(1, 2)


_KINDS: dict[str, Callable[..., Pair]] = {
    "half-split": half_split,
    "half-split, half tables": half_tables,
    "deinterleaved": deinterleaved,
    "interleaved, full tables": interleaved,
    "interleaved, complex table": complex_table,
}


def _serves(q: Tensor, k: Tensor, cos: Tensor, more: dict[str, Any]) -> bool:
    """Mixed dtypes promote in the model's function, and position_ids select rows there: those calls stay its own."""
    return (
        q.dtype == k.dtype == cos.dtype and q.dim() == 4 and cos.dim() in (2, 3) and not more.keys() - {"unsqueeze_dim"}
    )


def _rotate(
    original: Callable[..., Pair], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, half: int, pairs: bool, more: Any
) -> Pair:
    if not _serves(q, k, cos, more):
        return original(q, k, cos, sin, **more)
    heads = more.get("unsqueeze_dim", 1)
    if heads == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos[..., :half], sin[..., :half]))
    a, b = fastattn.rope_qk(q, k, cos, sin, interleaved=pairs)
    return (a.transpose(1, 2), b.transpose(1, 2)) if heads == 1 else (a, b)


def _evens_first(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@functools.cache
def recognise(function: Callable[..., Any]) -> str | None:
    """The kind whose results on random numbers are those of `function`, None when no kind's are."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 16, generator=g), torch.randn(2, 1, 5, 16, generator=g)
    angles = 6.0 * torch.rand(2, 5, 8, generator=g)
    cos, sin = angles.cos(), angles.sin()
    full = (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    tables: dict[str, tuple[Tensor, ...]] = {
        "half-split, half tables": (cos, sin),
        "interleaved, complex table": (torch.polar(torch.ones_like(angles), angles),),
    }
    for kind, ours in _KINDS.items():
        given = tables.get(kind, full)
        try:
            theirs = function(q, k, *given)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            continue  # it does not take such tables
        if not isinstance(theirs, tuple) or len(theirs) != 2 or any(x.shape != y.shape for x, y in zip(theirs, (q, k))):  # noqa: B905
            continue
        mine = ours(function, q, k, *given)
        if all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(mine, theirs, strict=True)):
            return kind
    return None


def halves_agree(model: nn.Module) -> str | None:
    """None when every rotary embedding of the model makes tables with two equal halves, else what was found."""
    embeddings = [m for m in model.modules() if "RotaryEmbedding" in type(m).__name__]
    if not embeddings:
        return "no rotary embedding was found whose tables could be checked"
    for module in embeddings:
        name = type(module).__name__
        for layer_type in sorted(set(getattr(module, "layer_types", None) or ())) or [None]:
            more = {} if layer_type is None else {"layer_type": layer_type}
            x = torch.zeros(1, 1, device=next((b.device for b in module.buffers()), "cpu"))
            try:
                tables = module(x, torch.arange(4, device=x.device)[None], **more)
            except Exception as error:  # whatever the model's own code may raise
                return f"the tables of {name} could not be checked ({type(error).__name__}: {error})"
            for table in tables if isinstance(tables, tuple) else ():
                half = table.shape[-1] // 2
                if not torch.equal(table[..., :half], table[..., half:]):
                    return f"the two halves of the tables of {name} differ"
    return None
