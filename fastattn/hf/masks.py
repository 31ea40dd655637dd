"""The mask function of transformers' AttentionMaskInterface: hands masks on as bands, padding rows and segments.

transformers describes a mask as nested Python functions of (batch, head, query position, key position). Those it makes
itself are recognised by the code they share and the values they closed over; for any other function, and while a
graph is being traced, its own `sdpa_mask` builds the full boolean matrix.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from transformers import PreTrainedModel, masking_utils

from fastattn.hf.compact import CompactMask, Pattern

Tensor = torch.Tensor


def fastattn_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    cache_position: Tensor | None = None,
    device: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass: a CompactMask, None (one query that sees every key) or a dense tensor.

    None would stand for a causal or a full mask too, but then the attention module must say which, and not every module
    tells the truth (BigBird-Pegasus' decoder says that it is not causal). While a graph is traced, it has to where the model
    runs on transformers' "sdpa" or flash attention, which trust it too; any other model gets the full matrix.

    batch_size, kv_length      sizes of the mask, as transformers passes them, by name
    q_length, q_offset         queries and the position of the first; before transformers 5.4 `cache_position` says both
    attention_mask             [batch, tokens] bool, True = a token; or None
    allow_is_causal_skip, ...  whether None may be returned

    Returns [batch, 1, seqlen_q, seqlen_k], True = may attend; additive for models that understand nothing else.
    """
    given: dict[str, Any] = {
        "batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset, "mask_function": mask_function,
        "attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip, **kwargs,
    }  # fmt: skip
    if cache_position is not None:
        given["cache_position"] = cache_position
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    else:
        given |= {"q_length": q_length, "q_offset": q_offset}
        if device is not None:
            given["device"] = device
    config = kwargs.get("config")
    if config is not None and _wants_additive_masks(config.__class__):
        return masking_utils.eager_mask(**given)
    tracing = _tracing(attention_mask, q_offset)
    if tracing and config is not None and not _runs_on(config.__class__, ("_supports_sdpa", "_supports_flash_attn")):
        given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    pattern = None if tracing else describe(mask_function)
    if pattern is None:
        return masking_utils.sdpa_mask(**given)
    assert q_length is not None
    padding = _padding(attention_mask, kv_length, kv_offset)
    device = device if device is not None else attention_mask.device if attention_mask is not None else "cpu"
    shift = int(q_offset) - int(kv_offset)
    pattern = _tighten(pattern, q_length, kv_length, shift)
    mask = CompactMask(batch_size, q_length, kv_length, pattern, shift, padding, device)
    if q_length == 1 and not (allow_is_causal_skip or allow_is_bidirectional_skip):
        return mask.dense()  # a row is as small; it may go into a compiled decoder as an input
    if padding is not None or pattern.segments is not None:
        return mask
    everything = pattern.left is None and pattern.right is None
    return None if everything and q_length == 1 else mask


@functools.cache
@torch.compiler.assume_constant_result
def _wants_additive_masks(config: type) -> bool:
    """This config's models were never made to run on SDPA, so know no boolean masks, and do more than to hand them on:
    an attention module appends columns of 0 and -inf (DeepSeek-V4) or adds the mask itself (BigBird-Pegasus' encoder).
    """
    if _runs_on(config, ("_supports_sdpa",)):
        return False
    attentions = [c for c in _classes_beside(config) if "Attention" in c.__name__]
    forwards = [getattr(getattr(c, "forward", None), "__code__", None) for c in attentions]
    return any(_uses_its_mask(forward) for forward in forwards if forward is not None)


@functools.cache
@torch.compiler.assume_constant_result
def _runs_on(config: type, marks: tuple[str, ...]) -> bool:
    """One of this config's models carries one of these marks of transformers."""
    models = [c for c in _classes_beside(config) if issubclass(c, PreTrainedModel)]
    return any(getattr(c, mark, False) for c in models for mark in marks)


def _classes_beside(config: type) -> list[type]:
    """What the modeling file of a config defines."""
    here = sys.modules.get(config.__module__.replace("configuration_", "modeling_"))
    return [c for c in vars(here).values() if isinstance(c, type) and c.__module__ == here.__name__] if here else []


def _uses_its_mask(forward: CodeType) -> bool:
    written = {i.argval for i in dis.get_instructions(forward) if i.opname.startswith("STORE_FAST")}
    given = "attention_mask" in forward.co_varnames
    return given and ("attention_mask" in written or "ALL_ATTENTION_FUNCTIONS" not in forward.co_names)


def describe(mask_function: Callable[..., Any]) -> Pattern | None:
    """The band and segments of a mask function of transformers, None for a function that has no such form."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return Pattern()
    if not inspect.isfunction(mask_function):
        return None
    kind = _codes().get(mask_function.__code__)
    closed = inspect.getclosurevars(mask_function).nonlocals
    if kind == "and_masks":
        return _both(closed["mask_functions"])
    if kind == "sliding_window_overlay":
        return Pattern(left=closed["sliding_window"] - 1)
    if kind == "sliding_window_bidirectional_overlay":
        return Pattern(closed["sliding_window"], closed["sliding_window"])
    if kind == "packed_sequence_mask_function":
        return Pattern(segments=closed["packed_sequence_mask"])
    return None


@functools.cache
def _codes() -> dict[CodeType, str]:
    """The code that the functions made by each factory of transformers share -> the factory's name."""
    examples: dict[str, tuple[Any, ...]] = {
        "and_masks": (masking_utils.causal_mask_function,),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "packed_sequence_mask_function": (torch.zeros(1, 1),),
        "remap_positions_for_packed_sequence": (masking_utils.causal_mask_function, torch.zeros(1, 1)),
    }
    factories = {name: getattr(masking_utils, name, None) for name in examples}
    return {factory(*examples[name]).__code__: name for name, factory in factories.items() if factory is not None}


def _both(functions: tuple[Callable[..., Any], ...]) -> Pattern | None:
    """The intersection of several patterns, None where one of them is not known."""
    remaps = [f for f in functions if inspect.isfunction(f) and _codes().get(f.__code__) == _REMAP]
    found = Pattern()
    for function in functions:
        pattern = describe(function) if function not in remaps else _inside(function)
        if pattern is None or (pattern.segments is not None and found.segments is not None):
            return None
        found = Pattern(
            _least(found.left, pattern.left),
            _least(found.right, pattern.right),
            found.segments if pattern.segments is None else pattern.segments,
        )
    for function in remaps:
        if found.segments is None or not _counts_up(_closed(function)["position_ids"], found.segments):
            return None
    return found


_REMAP = "remap_positions_for_packed_sequence"


def _closed(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


def _inside(remap: Callable[..., Any]) -> Pattern | None:
    """The band of a function that is asked about positions within a packed sequence."""
    pattern = describe(_closed(remap)["mask_function"])
    return pattern if pattern is not None and pattern.segments is None else None


def _counts_up(position_ids: Tensor, segments: Tensor) -> bool:
    """Positions grow by one within each segment, so that differences of positions are differences of indices."""
    same = segments[:, 1:] == segments[:, :-1]
    return bool(((position_ids[:, 1:] - position_ids[:, :-1] == 1) | ~same).all())


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _tighten(pattern: Pattern, seqlen_q: int, seqlen_k: int, shift: int) -> Pattern:
    """Bounds that no pair of this call reaches are no bounds."""
    left, right = pattern.left, pattern.right
    if left is not None and seqlen_q - 1 + shift - left <= 0:
        left = None
    if right is not None and shift + right >= seqlen_k - 1:
        right = None
    return Pattern(left, right, pattern.segments)


def _padding(attention_mask: Tensor | None, seqlen_k: int, kv_offset: int) -> Tensor | None:
    """[batch, seqlen_k] of these keys; tokens that are not in the mask yet are no tokens. None when all are."""
    if attention_mask is None:
        return None
    row = attention_mask.bool()
    missing = int(kv_offset) + seqlen_k - row.shape[1]
    if missing > 0:
        row = torch.nn.functional.pad(row, (0, missing))
    row = row[:, int(kv_offset) : int(kv_offset) + seqlen_k]
    return None if bool(row.all()) else row


def _tracing(*values: Any) -> bool:
    """Values cannot be read: inside torch.compile, export, jit tracing or fake tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return any(isinstance(v, Tensor) and type(v) not in (Tensor, torch.nn.Parameter) for v in values)
