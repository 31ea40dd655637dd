"""fastattn: attention, RoPE and norms for PyTorch transformers, forward and backward, fast on the hardware at hand.

The verbs are below; `fastattn.reference` has the same ones in plain PyTorch. `fastattn.nn`, `fastattn.sdpa` and
`fastattn.hf` put them into models and are imported when first used. `fastattn doctor` says what this machine runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastattn import reference
from fastattn._version import __version__
from fastattn.ops._dispatch import UnsupportedError, explain, use_backend
from fastattn.ops.attention import (
    attention,
    attention_kvcache,
    attention_weights,
    merge_attention,
    scaled_dot_product_attention,
)
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.rms_norm import rms_norm
from fastattn.ops.rope import rope, rope_qk

__all__ = [
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_kvcache",
    "attention_weights",
    "explain",
    "layer_norm",
    "merge_attention",
    "reference",
    "rms_norm",
    "rope",
    "rope_qk",
    "scaled_dot_product_attention",
    "use_backend",
]


if not TYPE_CHECKING:  # checkers would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name in ("hf", "nn", "sdpa"):
            return importlib.import_module(f"fastattn.{name}")
        raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
