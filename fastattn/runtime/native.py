"""Loads the compiled module `fastattn._native`, or warns that it cannot be loaded and remembers why.

The package works without it (on the reference backend); `fastattn doctor` prints `error()`.
"""

from __future__ import annotations

import warnings
from types import ModuleType

import torch

from fastattn.runtime import env

_module: ModuleType | None = None
_error: str | None = None


def _load() -> None:
    global _module, _error
    try:
        from fastattn import _native  # type: ignore[attr-defined]
    except ImportError as failure:
        _error = f"the native module is not built ({failure}); install fastattn with a C++17 compiler at hand"
        return
    if env.CPU_ISA is not None:
        if env.CPU_ISA not in _native.isas():
            _error = f"FASTATTN_CPU_ISA={env.CPU_ISA} is not among those this CPU and build offer: {_native.isas()}"
            return
        _native.set_isa(env.CPU_ISA)
    # torch's own C function table for DLPack makes a tensor cost 40 ns to read; without it attributes are read instead.
    _native.set_exchange_api(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    _native.set_hugepages(env.HUGEPAGES)
    _module = _native


def error() -> str | None:
    """Why the native module is absent; None when it is loaded."""
    return _error


def module() -> ModuleType:
    """The native module. Raises RuntimeError with the reason when it is absent."""
    if _module is None:
        raise RuntimeError(f"fastattn: {_error}")
    return _module


_load()
if _error is not None:
    warnings.warn(f"fastattn: {_error}. Until then CPU tensors go to the slow reference", RuntimeWarning, stacklevel=2)
