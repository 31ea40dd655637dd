"""The emulator's own test kernels (kernels/): how they are launched."""

from __future__ import annotations

from pathlib import Path

import torch

from fastattn.runtime import cuda, params

from .run import run

KERNELS = Path(__file__).resolve().parent / "kernels"
LAYOUT = params.layout(str(KERNELS / "trial_params.h"), "TrialParams")


def trial(
    name: str,
    out: torch.Tensor | None,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    file: str,
    threads: int = 32,
    shared: int = 1024,
    constants: tuple[str, ...] = (),
    grid: int = 1,
    cluster: int = 1,
    n: int = 0,
    fault: int = 0,
    maps: tuple[cuda.TensorMap | None, ...] = (),
    seed: int = 0,
    together: int = 1,
) -> None:
    """Run a kernel of kernels/`file` once; raises EmulatorError where it is at fault."""
    kernel = cuda.Kernel(file, name, constants, LAYOUT, threads, shared, cluster, hopper=True)
    padded = [m if m is not None else bytes(128) for m in (*maps, None, None, None)[:3]]
    run(cuda.Launch(kernel, (grid, 1, 1), (a, b, out, n, fault, *padded)), seed=seed, folder=KERNELS, together=together)
