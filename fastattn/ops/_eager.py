"""The short road of small eager calls: one native call that reads the tensors, checks, allocates and computes.

A decoding step calls norms and RoPE hundreds of times on one token, where the ordinary road (specification, choice of
a backend, Op) costs more than the arithmetic. The rooms of `layer_norm`, `rms_norm` and `rope` therefore ask `plain`
first; when it says yes they call their `*_eager` door, which answers None to anything that it does not know by heart.
Then, and for every call that is not plain, the ordinary road serves the call or raises the error in the user's words.
Both roads end in the same kernel, so they cannot disagree. Norms that want gradients go the short road inside their Op:
`_norm.short_forward` and `short_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from fastattn.ops import _dispatch
from fastattn.runtime import env, native

_compiling = torch.compiler.is_dynamo_compiling  # what else compiles shows as a mode; is_compiling costs 40 ns more
_jit_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled
_explaining = _dispatch._explaining.get
_scoped_backend = _dispatch._scoped_backend.get
_plain_types = (torch.Tensor, torch.nn.Parameter)

# None when the native module is absent. FASTATTN_BACKEND is read once, at import, like every variable.
door: Any = None if native.error() is not None or env.BACKEND is not None else native.module()


def unforced() -> bool:
    """True when nobody asks for a backend by name or for an explanation; for implementations, which see real tensors."""
    return door is not None and not _explaining() and not _scoped_backend()


def plain(*tensors: torch.Tensor | None) -> bool:
    """True when the tensors' data alone decide the result: no tracing, mode, subclass, gradient or forced backend."""
    if _compiling() or door is None or _dispatch_modes() or _functorch_active() or _explaining() or _scoped_backend():
        return False
    if forward_ad._current_level >= 0 or _jit_tracing():
        return False
    grad = _grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _plain_types or (grad and tensor.requires_grad)):
            return False
    return True
