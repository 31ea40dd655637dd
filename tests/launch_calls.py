"""One small call of each operation, on which the host's time for a launch is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastattn

WITHOUT_BACKWARD = ("attention_kvcache",)


def calls(grad: bool = False) -> dict[str, Callable[[], Any]]:
    def tensor(*size: int) -> torch.Tensor:
        return torch.zeros(size, requires_grad=grad)

    x, residual, weight, bias = tensor(2, 4, 64), tensor(2, 4, 64), tensor(64), tensor(64)
    q, k = tensor(1, 4, 4, 64), tensor(1, 4, 2, 64)
    cos, sin = torch.ones(4, 32), torch.zeros(4, 32)
    token, cache = torch.zeros(2, 1, 4, 64), torch.zeros(2, 512, 2, 64)
    lengths = torch.tensor([5, 7], dtype=torch.int32)
    return {
        "rms_norm": lambda: fastattn.rms_norm(x, weight),
        "rms_norm with residual": lambda: fastattn.rms_norm(x, weight, residual=residual),
        "layer_norm": lambda: fastattn.layer_norm(x, weight, bias),
        "rope_qk": lambda: fastattn.rope_qk(q, k, cos, sin),
        "attention_kvcache": lambda: fastattn.attention_kvcache(token, cache, cache, lengths, num_splits=1),
        "attention": lambda: fastattn.attention(q, k, k, causal=True),
    }


def backward_of(outs: torch.Tensor | Sequence[torch.Tensor]) -> Callable[[], Any]:
    """`autograd.grad` of what a call gave, for all of its inputs."""
    outs = outs if isinstance(outs, Sequence) else (outs,)
    assert outs[0].grad_fn is not None
    inputs = [e[0].variable for e in outs[0].grad_fn.next_functions if e[0] is not None]
    ones = [torch.ones_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, inputs, ones, retain_graph=True)
