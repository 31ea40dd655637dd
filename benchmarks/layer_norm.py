"""layer_norm against F.layer_norm and torch.compile of it."""

from __future__ import annotations

import torch.nn.functional as F

import fastattn
from fastattn.ops.layer_norm.reference import layer_norm as reference

from . import _norm
from .case import OURS, Case
from .rivals import compiled


def _torch(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def cases(quick: bool = False) -> list[Case]:
    ways = {OURS: lambda: fastattn.layer_norm, "F.layer_norm": lambda: _torch, "compiled": lambda: compiled(_torch)}
    return _norm.cases("layer_norm", ways, reference, 2, quick)
