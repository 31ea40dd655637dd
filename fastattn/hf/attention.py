"""The attention function of transformers' AttentionInterface, on `fastattn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import fastattn
from fastattn.hf.compact import CompactMask, Packed, Pattern, pack, segments_of
from fastattn.hf.masks import fastattn_mask
from fastattn.ops._check import fail

try:  # which outputs a model was asked for; before it existed, models passed output_attentions on
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _wanted_outputs = None
else:
    _wanted_outputs = _active_collector.get

Tensor = torch.Tensor
NAME = "fastattn"
REFUSED = {
    "cache": "continuous batching hands its paged cache to the attention function",
    "indices": "a sparse choice of keys per query",
    "block_indices": "a sparse choice of key blocks per query",
    "sinks": "sink logits per query",
}


def register() -> None:
    """Make `attn_implementation="fastattn"` known to transformers, with the mask function that belongs to it.

    Idempotent. Raises nothing.

    >>> fastattn.hf.register()
    >>> model = AutoModel.from_pretrained(name, attn_implementation="fastattn")
    """
    AttentionInterface.register(NAME, fastattn_attention)
    AttentionMaskInterface.register(NAME, fastattn_mask)


def fastattn_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a transformers model calls: [batch, nheads, seqlen, headdim] in, [batch, seqlen, nheads, headdim_v] out.

    attention_mask  None: the module's own causality (one that does not say is causal, unless its keys are more than its
                    queries); a CompactMask; [batch, seqlen_k] 0/1 padding; or the user's 4-D mask, boolean (True = may
                    attend) or floating (added to the scores), taken as it is
    position_bias   [1 or batch, nheads, seqlen_q, seqlen_k] added to the scores, with gradient (T5)
    s_aux           [nheads] sink logits, with gradient (GPT-OSS)
    position_ids, cu_seq_lens_q, cu_seq_lens_k: packed sequences that the mask says nothing of

    Returns the output and, when the model was asked for attentions, the probabilities, else None.
    Raises UnsupportedError for the arguments in `REFUSED` and for probabilities under dropout, ValueError for masks
    that cannot be understood.
    """
    for name, meaning in REFUSED.items():
        if kwargs.get(name) is not None:
            raise fastattn.UnsupportedError(f"fastattn.hf: {name} must be None, got a value ({meaning})")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", query.shape[2] == key.shape[2])
    q, k, v = (_unit_last_stride(x.transpose(1, 2)) for x in (query, key, value))
    options: dict[str, Any] = {"scale": _own_scale(module, q) if scaling is None else scaling, "softcap": softcap}
    packed = None
    if isinstance(attention_mask, CompactMask):
        packed = _use_compact(attention_mask, options, k.shape[1])
    elif attention_mask is None:
        if is_causal and q.shape[1] > 1:
            options |= {"causal": True, "keys": q.shape[1]}
    else:
        _use_tensor(attention_mask, options, q, k, bool(is_causal))
    if packed is None and "mask" not in options and "bias" not in options:
        packed = _packed(options, q, k, kwargs)
    end = options.pop("keys", k.shape[1])
    if end < k.shape[1]:
        k, v = k[:, :end], v[:, :end]
    if position_bias is not None:
        bias = position_bias[..., :end]
        options["bias"] = bias if "bias" not in options else options["bias"] + bias
    for name in ("mask", "bias"):
        if name in options and options[name].shape[-1] > end:
            options[name] = options[name][..., :end]
    if _wants_weights(kwargs):
        if dropout:
            raise fastattn.UnsupportedError(f"fastattn.hf: output_attentions must be False with dropout, got {dropout}")
        return _with_weights(q, k, v, options, packed, s_aux)
    if packed is not None and "bias" not in options:
        return _attend_packed(q, k, v, packed, sinks=s_aux, dropout_p=dropout, **options), None
    if packed is not None:
        options["mask"] = _same_sequence(packed, q)
    return fastattn.attention(q, k, v, sinks=s_aux, dropout_p=dropout, **options), None


def _use_compact(mask: CompactMask, options: dict[str, Any], seqlen_k: int) -> Packed | None:
    """Put a compact mask into the options of `attention`; `keys` is how many keys any query can see."""
    seqlen_q = mask.shape[2]
    left, right, _ = mask.pattern
    packed = mask.packed()
    plain = left is None and right is None
    bottom_right = mask.shift == seqlen_k - seqlen_q
    if seqlen_k != mask.shape[3] or (packed is not None and (mask.padding is not None or not bottom_right)):
        options["mask"] = mask.dense()
        return None
    if right == 0 and 0 <= mask.shift <= seqlen_k - seqlen_q:
        options |= {"causal": True, "keys": mask.shift + seqlen_q}
        if left is not None:
            options["window"] = (left, None)
    elif bottom_right and not plain:
        options["window"] = (left, right)
    elif not plain:
        options["mask"] = mask.dense()
        return None
    if mask.padding is not None:
        options["mask"] = mask.padding[:, None, None, :]
    return packed


def _use_tensor(mask: Tensor, options: dict[str, Any], q: Tensor, k: Tensor, is_causal: bool) -> None:
    """Put a mask that the user or the model made into the options of `attention`."""
    batch, seqlen_q, _, _ = q.shape
    seqlen_k = k.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        fact = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        fail("fastattn.hf", "attention_mask", "None or a tensor of 2 or 4 dimensions", fact)
    if mask.dim() == 4:
        if mask.dtype == torch.bool:
            count = _leading(mask) if seqlen_q == 1 else None
            if count is None:
                options["mask"] = mask
            else:
                options["keys"] = min(count, seqlen_k)
        elif mask.is_floating_point():
            options["bias"] = mask if mask.dtype in (q.dtype, torch.float32) else mask.to(q.dtype)
        else:
            fail("fastattn.hf", "attention_mask", "boolean or floating when it has 4 dimensions", mask.dtype)
        return
    if mask.shape != (batch, seqlen_k) or mask.is_floating_point():
        expected = f"0/1 padding [batch, seqlen_k] {(batch, seqlen_k)} when it has 2 dimensions"
        fail("fastattn.hf", "attention_mask", expected, f"{mask.dtype} {tuple(mask.shape)}")
    options["mask"] = mask.bool()[:, None, None, :]
    if is_causal and seqlen_q > 1:
        options["causal"] = True


def _leading(mask: Tensor) -> int | None:
    """How many keys a row mask allows when it allows the first ones and no other: the row of a static cache in decoding.

    Remembered on the tensor: every layer of a model gets the same one. None for other masks and where values cannot be
    read without waiting.
    """
    if not mask.is_cpu or type(mask) is not Tensor or torch.compiler.is_compiling() or mask.numel() == 0:
        return None
    version = None if mask.is_inference() else mask._version
    known = getattr(mask, "_fastattn_leading", None)
    if version is not None and known is not None and known[0] == version:
        return known[1]
    count = int(mask[0, 0].sum())
    others = mask[..., count:].any() or not mask[..., :count].all()
    leading = None if bool(others) or count == 0 else count
    mask._fastattn_leading = (version, leading)  # type: ignore[attr-defined]
    return leading


def _packed(options: dict[str, Any], q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> Packed | None:
    """Packed sequences that only the arguments tell of: cu_seq_lens, or position_ids that restart."""
    batch, seqlen = q.shape[:2]
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_q is not None:
        if (cu_k is not None and cu_k is not cu_q and not torch.equal(cu_q, cu_k)) or seqlen != k.shape[1]:
            raise fastattn.UnsupportedError("fastattn.hf: cu_seq_lens_k must be cu_seq_lens_q, got other lengths")
        cu_q = cu_q.to(device=q.device, dtype=torch.int32)
        if int(cu_q[-1]) != batch * seqlen:
            fail("fastattn.hf", "cu_seq_lens_q", f"ending at the tokens of the batch ({batch * seqlen})", int(cu_q[-1]))
        longest = kwargs.get("max_length_q")
        return Packed(cu_q, int((cu_q[1:] - cu_q[:-1]).max()) if longest is None else int(longest))
    position_ids = kwargs.get("position_ids")
    if not options.get("causal") or options["keys"] != k.shape[1] or seqlen != k.shape[1] or position_ids is None:
        return None
    if torch.compiler.is_compiling() or position_ids.dim() != 2 or position_ids.shape[1] != seqlen:
        return None
    return _restarts(position_ids, batch)


def _restarts(position_ids: Tensor, batch: int) -> Packed | None:
    """Remembered on the tensor itself: every layer of a model asks about the same one."""
    version = None if position_ids.is_inference() else position_ids._version
    known = getattr(position_ids, "_fastattn_packed", None)
    if version is not None and known is not None and known[:2] == (version, batch):
        return known[2]
    segments = segments_of(position_ids.expand(batch, -1))
    packed = pack(segments) if bool(segments[:, -1].any()) else None
    position_ids._fastattn_packed = (version, batch, packed)  # type: ignore[attr-defined]
    return packed


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, packed: Packed, **options: Any) -> Tensor:
    batch, seqlen = q.shape[:2]
    o = fastattn.attention(
        *(x.reshape(batch * seqlen, *x.shape[2:]) for x in (q, k, v)),
        cu_seqlens_q=packed.cu_seqlens,
        max_seqlen_q=packed.max_seqlen,
        max_seqlen_k=packed.max_seqlen,
        **options,
    )
    return o.reshape(batch, seqlen, *o.shape[1:])


def _same_sequence(packed: Packed, q: Tensor) -> Tensor:
    """[batch, 1, seqlen, seqlen] bool, for what has no packed form."""
    batch, seqlen = q.shape[:2]
    lengths = packed.cu_seqlens.diff()
    segments = torch.repeat_interleave(lengths.long()).reshape(batch, seqlen)
    return CompactMask(batch, seqlen, seqlen, Pattern(segments=segments), 0, None, q.device).dense()


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    if _wanted_outputs is None or torch.compiler.is_compiling():
        return False
    wanted = _wanted_outputs()
    return bool(wanted) and any(name.endswith("attentions") for name in wanted)


def _with_weights(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], packed: Packed | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    if packed is not None:
        options = options | {"mask": _same_sequence(packed, q)}
    o, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, **options)
    return o, fastattn.attention_weights(q, k, lse, **options)


def _own_scale(module: torch.nn.Module, q: Tensor) -> float | None:
    """GPT-2 of early transformers 5 keeps its scale to itself; None, the default, for every other module."""
    if not hasattr(module, "scale_attn_weights"):
        return None
    scale = q.shape[-1] ** -0.5 if module.scale_attn_weights else 1.0
    layer: Any = getattr(module, "layer_idx", None)
    return scale / (layer + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
