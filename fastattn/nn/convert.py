"""from_torch: a model of torch's modules, on fastattn."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

_TWINS: dict[type, Any] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.RMSNorm: RMSNorm,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


def from_torch(model: torch.nn.Module) -> torch.nn.Module:
    """Every attention, transformer layer and norm of torch's in `model` becomes fastattn's, with the same parameters.

    model  a module; its submodules are replaced in place. Only instances of exactly torch's classes are: a subclass may
           compute something else

    Returns the model, or its twin when it is itself such a module.

    >>> model = fastattn.nn.from_torch(torch.nn.Transformer(batch_first=True))
    """
    twins: dict[torch.nn.Module, torch.nn.Module] = {}  # a module that appears twice stays one

    def replaced(module: torch.nn.Module) -> torch.nn.Module:
        if module not in twins:
            twin = _TWINS[type(module)].from_torch(module) if type(module) in _TWINS else module
            twins[module] = twins[twin] = twin
            for name, child in list(twin._modules.items()):
                if child is not None:
                    twin._modules[name] = replaced(child)
        return twins[module]

    return replaced(model)
