"""Swap attention, norms and RoPE of one model object, and take it back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastattn.hf import norms as _norms
from fastattn.hf import rotary as _rotary
from fastattn.hf.attention import NAME, register
from fastattn.hf.report import Report

_CONFIGS = "_fastattn_configs"
_MARK = "_fastattn_forward"


def patch(model: nn.Module, attention: bool = True, norms: bool = True, rope: bool = True) -> Report:
    """Let this model object compute with fastattn: its attention, its norms, its rotary embedding.

    model      a transformers model, bare or inside other modules (peft, a classifier of your own)
    attention  `attn_implementation="fastattn"`, on a copy of the model's config, so that no other model changes
    norms      nn.LayerNorm and RMS norms, each with the rounding that its own forward turns out to have
    rope       the rotary function that an attention module's forward calls

    Only this object changes: other models of the same classes keep their bits. Parameters, buffers, hooks and
    state_dict stay; `unpatch` takes everything back. Patching again patches what has been added since.
    Returns a Report of what was replaced and what was not, and why. Raises TypeError when model is no nn.Module.

    >>> print(fastattn.hf.patch(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be an nn.Module, got {type(model).__name__}")
    report = Report(type(model).__name__)
    if attention:
        _patch_attention(model, report)
    if norms:
        _patch_forwards(model, report, "norm", _norms.replacement)
    if rope:
        agree = _rotary.halves_agree(model)
        _patch_forwards(model, report, "rope", functools.partial(_rotary.replacement, halves_agree=agree))
    return report


def unpatch(model: nn.Module) -> None:
    """Take back what `patch` did to this model; a model that was not patched stays as it is.

    >>> fastattn.hf.unpatch(model)
    """
    for module in model.modules():
        if vars(module).pop(_MARK, False):
            del module.forward
        config = vars(module).pop(_CONFIGS, None)
        if config is not None:
            module.config = config  # type: ignore[assignment]


def _patch_forwards(
    model: nn.Module,
    report: Report,
    part: str,
    replacement: Callable[[nn.Module], tuple[Callable[..., Any] | None, str] | None],
) -> None:
    for path, module in model.named_modules():
        if _MARK in vars(module):
            continue
        found = replacement(module)
        if found is None:
            continue
        forward, detail = found
        if forward is not None and _is_foreign(module):
            forward, detail = None, "another library has replaced the forward of this module"
        if forward is not None:
            module.forward = forward
            vars(module)[_MARK] = True
        report.add(part, module, path, forward is not None, detail)


def _is_foreign(module: nn.Module) -> bool:
    """This instance has a forward of its own that is not just the class's, bound (which early transformers 5 leave)."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _patch_attention(model: nn.Module, report: Report) -> None:
    register()
    if not any(_CONFIGS in vars(module) for module in model.modules()):
        memo: dict[int, Any] = {}
        for module in model.modules():
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig):
                vars(module)[_CONFIGS] = config
                module.config = copy.deepcopy(config, memo)  # type: ignore[assignment]
    for module in model.modules():  # the inner ones too: an outer model does not always hand it on
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != NAME:
            module.set_attn_implementation(NAME)
    for path, module in model.named_modules():
        if "Attention" not in type(module).__name__:
            continue
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            set_to = getattr(getattr(module, "config", None), "_attn_implementation", None)
            why = "fastattn.attention" if set_to == NAME else f"transformers kept attn_implementation={set_to!r}"
            report.add("attention", module, path, set_to == NAME, why)
        elif not any("Attention" in type(child).__name__ for child in module.children()):
            report.add("attention", module, path, False, "its forward does not go through AttentionInterface")
