"""rms_norm against F.rms_norm, the formula of Hugging Face's Llama, and torch.compile of that formula."""

from __future__ import annotations

import torch.nn.functional as F

import fastattn
from fastattn.ops.rms_norm.reference import rms_norm as reference

from . import _norm
from .case import OURS, Case
from .rivals import compiled, llama_rms_norm


def _torch(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _llama(x, weight):
    return llama_rms_norm(x, weight, 1e-6)


def cases(quick: bool = False) -> list[Case]:
    ways = {
        OURS: lambda: fastattn.rms_norm,
        "F.rms_norm": lambda: _torch,
        "HF formula": lambda: _llama,
        "compiled": lambda: compiled(_llama),
    }
    return _norm.cases("rms_norm", ways, reference, 1, quick)
