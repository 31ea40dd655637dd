"""A module of torch's becomes one of ours without initialising anything."""

from __future__ import annotations

from typing import Any

import torch


def twin_of(cls: Any, module: torch.nn.Module) -> Any:
    """A `cls` with all that module has: parameters, buffers, submodules and hooks are shared, their registries are not."""
    twin = cls.__new__(cls)
    twin.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    return twin
