"""The GPU under the measurement: its name and software, and what it attains, measured in the same run."""

from __future__ import annotations

import datetime
import platform
import re
from typing import Any

import torch

import fastattn

from ..machine import commit, version_of
from .timing import Watch, measure

SOFTWARE = ("torch", "triton", "flash-attn-4", "flash-attn", "liger-kernel", "quack-kernels", "flashinfer-python")


def describe(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"gpu": "none"}
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        facts = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts | {
        "fastattn": fastattn.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in SOFTWARE if (version := version_of(name))},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def slug(facts: dict[str, Any]) -> str:
    """Folder name under results/: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")


class Peaks:
    """GFLOP/s of a large matrix product by dtype and GB/s of a copy (read plus write), measured when first asked."""

    def __init__(self, device: torch.device, watch: Watch, size: int = 8192, copied: int = 1 << 30) -> None:
        self._device, self._watch, self._size, self._copied = device, watch, size, copied
        self._found: dict[str, float] = {}

    def of(self, bound: str, dtype: str) -> float:
        key = dtype if bound == "flops" else "copy"
        if key not in self._found:
            self._found[key] = self._product(dtype) if bound == "flops" else self._copy()
        return self._found[key]

    def _product(self, dtype: str) -> float:
        from ..case import DTYPES

        n = self._size
        a, b = (torch.randn(n, n, device=self._device, dtype=torch.float32).to(DTYPES[dtype]) for _ in range(2))
        return 2 * n**3 / measure({"product": lambda: a @ b}, self._watch, 0.5)["product"].median / 1e9

    def _copy(self) -> float:
        a = torch.empty(self._copied, dtype=torch.int8, device=self._device)
        b = torch.empty_like(a)
        return 2 * self._copied / measure({"copy": lambda: b.copy_(a)}, self._watch, 0.5)["copy"].median / 1e9
