"""An attention processor for diffusers' UNets (Stable Diffusion): self- and cross-attention on `fastattn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_processor as processors
from torch import nn

import fastattn
from fastattn.hf.report import Report
from fastattn.ops._check import fail

Tensor = torch.Tensor
_STANDARD = tuple(getattr(processors, n) for n in ("AttnProcessor", "AttnProcessor2_0") if hasattr(processors, n))
_BEFORE = "_fastattn_processor"


class FastAttnProcessor:
    """What diffusers' `Attention` module calls; takes the place of AttnProcessor and AttnProcessor2_0.

    attn                   the module with the projections, norms and heads
    hidden_states          [batch, tokens, channels] or an image [batch, channels, height, width]
    encoder_hidden_states  [batch, tokens, channels] to attend to (the text), None for self-attention
    attention_mask         [batch, 1, keys] added to the scores, as the UNet makes it; [batch, keys] bool, True = token

    Returns a tensor of hidden_states' shape. Raises ValueError for a mask of another shape.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual, image = hidden_states, hidden_states.shape
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if len(image) == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        mask, bias = _pairs(attention_mask, q, k)
        o = fastattn.attention(q, k, v, scale=attn.scale, mask=mask, bias=bias).flatten(2)
        for layer in attn.to_out:
            o = layer(o)
        if len(image) == 4:
            o = o.transpose(1, 2).reshape(image)
        if attn.residual_connection:
            o = o + residual
        return o / attn.rescale_output_factor


def _pairs(given: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) of `attention`, broadcast instead of repeated for every head and query."""
    if given is None:
        return None, None
    batch, heads, keys = q.shape[0], q.shape[2], k.shape[1]
    if given.dtype == torch.bool and given.shape == (batch, keys):
        return given[:, None, None], None
    if not given.is_floating_point() or given.dim() != 3 or given.shape[2] != keys:
        fail("fastattn.hf.diffusers", "attention_mask", f"[batch, 1, keys] with {keys} keys", tuple(given.shape))
    if given.shape[0] == batch * heads and heads > 1:
        return None, given.unflatten(0, (batch, heads)).to(q.dtype)
    return None, given[:, None].to(q.dtype)


def patch(model: nn.Module) -> Report:
    """Let every attention of this diffusers model that runs a standard processor run `FastAttnProcessor`.

    Returns a Report; processors of other kinds (added keys, image prompts, LoRA of old) are kept, and named.

    >>> print(fastattn.hf.diffusers.patch(pipeline.unet))
    """
    report = Report(type(model).__name__)
    for path, module in model.named_modules():
        if not isinstance(module, processors.Attention):
            continue
        before = module.processor
        done = type(before) in _STANDARD
        if done:
            vars(module)[_BEFORE] = before
            module.set_processor(FastAttnProcessor())  # type: ignore[arg-type]
        elif isinstance(before, FastAttnProcessor):
            continue
        why = "fastattn.attention" if done else f"{type(before).__name__} does more than AttnProcessor"
        report.add("attention", module, path, done, why)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every attention its processor back.

    >>> fastattn.hf.diffusers.unpatch(pipeline.unet)
    """
    for module in model.modules():
        before = vars(module).pop(_BEFORE, None)
        if before is not None:
            module.set_processor(before)  # type: ignore[operator]
