"""What classifier.py and finetune_lora.py share: real sentences with labels, and a race of two equal models.

The race trains plain PyTorch and fastattn from the same weights on the same batches, in turns, step by step; a third,
plain model in float64 goes along for the first steps and says how large the noise of float32 is.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastattn.hf
from fastattn.benchmarks.law import FACTOR
from fastattn.hf.law import float64

LIBRARIES = {
    "Python": ("ast", "asyncio", "collections", "csv", "datetime", "email.message", "inspect", "json", "logging", "os",
               "pathlib", "random", "re", "shutil", "socket", "ssl", "statistics", "string", "subprocess", "typing",
               "unittest", "urllib.request", "xml.dom.minidom", "zipfile"),
    "NumPy": ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random", "numpy.strings"),
    "PyTorch": ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.linalg", "torch.fft", "torch.special",
                "torch.distributions", "torch.utils.data"),
}  # fmt: skip


def library_sentences(per_library: int) -> tuple[list[str], list[int]]:
    """Sentences of the documentation of Python's library, NumPy and PyTorch, and which of the three each is from."""
    texts, labels = [], []
    for label, modules in enumerate(LIBRARIES.values()):
        found: dict[str, None] = {}
        for name in modules:
            module = importlib.import_module(name)
            objects = [getattr(module, attribute) for attribute in sorted(dir(module)) if attribute[0] != "_"]
            methods = [m for o in objects if inspect.isclass(o) for m in vars(o).values() if inspect.isfunction(m)]
            for text in (inspect.getdoc(o) or "" for o in (*objects, *methods) if callable(o)):
                for sentence in re.findall(r"[A-Z][\w ,'`()-]{30,200}\.(?=\s|$)", re.sub(r"\s+", " ", text)):
                    found.setdefault(sentence.replace("`", ""))
        chosen = list(found)[:: max(1, len(found) // per_library)][:per_library]
        texts += chosen
        labels += [label] * len(chosen)
    return texts, labels


@dataclass
class Race:
    """Losses per step by contender, and seconds per step of the two that were timed."""

    losses: dict[str, list[float]] = field(default_factory=lambda: {"plain": [], "fastattn": [], "float64": []})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"plain": [], "fastattn": []})

    def ratio(self) -> float:
        """How many times faster fastattn's steps are, by medians."""
        plain, ours = (statistics.median(self.seconds[name]) for name in ("plain", "fastattn"))
        return plain / ours

    def noise(self) -> tuple[float, float]:
        """RMS distance of (fastattn's, plain's) losses from float64's, over float64's steps."""
        truth = torch.tensor(self.losses["float64"], dtype=torch.float64)
        return tuple(
            float((torch.tensor(self.losses[name][: len(truth)], dtype=torch.float64) - truth).square().mean().sqrt())
            for name in ("fastattn", "plain")
        )  # type: ignore[return-value]

    def lawful(self) -> bool:
        """fastattn's losses are as near to float64's as plain PyTorch's, times two, or within their last bits."""
        ours, plain = self.noise()
        return ours <= FACTOR * plain + 4 * torch.finfo(torch.float32).eps * max(self.losses["float64"])

    def report(self) -> None:
        steps = len(self.losses["plain"])
        print(f"\n{'step':>6}{'plain':>12}{'fastattn':>12}{'difference':>13}")
        for step in sorted({*range(0, steps, max(1, steps // 8)), steps - 1}):
            plain, ours = self.losses["plain"][step], self.losses["fastattn"][step]
            print(f"{step:>6}{plain:>12.5f}{ours:>12.5f}{abs(plain - ours):>13.1e}")
        ours, plain = self.noise()
        count = len(self.losses["float64"])
        print(f"distance from float64 over {count} steps: fastattn {ours:.1e}, plain PyTorch {plain:.1e}")
        seconds = {name: statistics.median(values) for name, values in self.seconds.items()}
        print(
            f"seconds per step: plain {seconds['plain']:.3f}, fastattn {seconds['fastattn']:.3f}: "
            f"{self.ratio():.2f}x with {torch.get_num_threads()} threads"
        )


def race(
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    steps: int,
    exact_steps: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> tuple[Race, nn.Module]:
    """Train `model` (attn_implementation="sdpa") and a patched copy; returns what happened and the patched one."""
    models = {"plain": model, "fastattn": copy.deepcopy(model), "float64": copy.deepcopy(model).double()}
    print(fastattn.hf.patch(models["fastattn"]))
    optimizers = {name: optimizer(m) for name, m in models.items()}
    found = Race()

    def step(name: str, batch: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        optimizers[name].zero_grad(set_to_none=True)
        loss = models[name](**batch).loss
        loss.backward()
        optimizers[name].step()
        if name in found.seconds:
            found.seconds[name].append(time.perf_counter() - start)
        found.losses[name].append(float(loss.detach()))

    for i in range(steps):
        batch = next(batches)
        for name in ("plain", "fastattn") if i % 2 else ("fastattn", "plain"):
            step(name, batch)
        if i < exact_steps:
            with float64():
                step("float64", batch)
        if i + 1 == exact_steps:
            del models["float64"], optimizers["float64"]
    return found, models["fastattn"]
