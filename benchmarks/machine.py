"""The machine under the measurement: its name, its software, and what it can attain, measured in the same run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastattn
from fastattn.runtime import native

SOFTWARE = ("torch", "triton", "numpy", "onnxruntime", "transformers")


def cpu_model() -> str:
    """`AMD EPYC, family 25 model 17`: hypervisors shorten the name, so family and model are told with it."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name") or platform.machine()
    if "cpu family" in fields:
        name += f", family {fields['cpu family']} model {fields.get('model', '?')}"
    return name


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, `+` when files differ from it; None for an installed package."""
    root = Path(fastattn.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=root, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def slug(cpu: str, threads: int) -> str:
    """Folder name under results/: `amd-epyc-family-25-model-17-2t`."""
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") + f"-{threads}t"


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    threads: int
    isa: str
    python: str
    fastattn: str
    versions: dict[str, str | None]
    commit: str | None
    date: str
    huge_pages: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @property
    def slug(self) -> str:
        return slug(self.cpu, self.threads)


def describe() -> Machine:
    return Machine(
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa="none (no native module)" if native.error() else native.module().isa(),
        python=platform.python_version(),
        fastattn=fastattn.__version__,
        versions={name: version_of(name) for name in SOFTWARE},
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        huge_pages=transparent_huge_pages(),
    )


def transparent_huge_pages() -> str:
    """The kernel's choice among always, madvise and never; "unknown" where it does not say."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen.group(1) if chosen else "unknown"


class Attainable:
    """Peaks of this machine, measured `BURSTS` times at every ask, before and after each case: the best seen counts."""

    BURSTS = 3

    def __init__(self) -> None:
        self._best: dict[tuple[str, int, int], float] = {}

    def flops(self, dtype: str, threads: int) -> float | None:
        """GFLOP/s of multiply-adds. Only bf16 has its own instruction; fp16 is widened to fp32 before multiplying."""
        kind = "bf16" if dtype == "bf16" else "fp32"
        return self._measure("fma_" + kind, 0, threads, lambda m: m.fma_peak(kind, 0.02, threads))

    def copy(self, nbytes: int, threads: int) -> float | None:
        """GB/s of the fastest copy that moves `nbytes` in all, read plus write."""
        source = max(nbytes // 2, 1 << 20)
        return self._measure("copy", source, threads, lambda m: m.copy_bandwidth(source, threads))

    def read(self, nbytes: int, threads: int) -> float | None:
        source = max(nbytes, 1 << 20)
        return self._measure("read", source, threads, lambda m: m.read_bandwidth(source, threads))

    def _measure(self, kind: str, size: int, threads: int, probe) -> float | None:
        if native.error() is not None:
            return None
        key = (kind, size, threads)
        self._best[key] = max(self._best.get(key, 0.0), *(probe(native.module()) for _ in range(self.BURSTS)))
        return self._best[key]
