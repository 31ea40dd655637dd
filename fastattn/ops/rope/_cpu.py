"""rope on the native CPU kernel (csrc/cpu/rope_kernels.cpp)."""

from __future__ import annotations

import torch

from fastattn.ops import _alloc
from fastattn.runtime import native


def forward(op, x, k, cos, sin, position_ids, interleaved, inverse):
    """The rotated x and k (None without k), laid out like them. The door checks the range of position_ids."""
    y = _alloc.empty_like(x)
    k_out = None if k is None else _alloc.empty_like(k)
    threads = torch.get_num_threads()
    native.module().rope(op, x, y, k, k_out, cos, sin, position_ids, interleaved, inverse, threads)
    return y, k_out
