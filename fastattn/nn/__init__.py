"""Modules for people who build models: torch's own, with the same arguments, state and results, on fastattn's kernels.

README.md has the table of what is the same and what differs.
"""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.convert import from_torch
from fastattn.nn.kvcache import KVCache
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.sinusoidal import SinusoidalPositionalEncoding
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "from_torch",
]
