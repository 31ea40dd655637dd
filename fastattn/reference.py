"""The formulas in plain PyTorch: any device, any dtype, every option, differentiable. The law everything is held to."""

from fastattn.ops.attention.reference import attention, attention_kvcache, attention_weights, merge_attention
from fastattn.ops.layer_norm.reference import layer_norm
from fastattn.ops.rms_norm.reference import rms_norm
from fastattn.ops.rope.reference import rope, rope_qk

__all__ = [
    "attention",
    "attention_kvcache",
    "attention_weights",
    "layer_norm",
    "merge_attention",
    "rms_norm",
    "rope",
    "rope_qk",
]
