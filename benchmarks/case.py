"""What is measured: a case builds a problem, a problem holds the truth and its contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .law import FACTOR, Results

OURS = "fastattn"
COMPILED = ("compiled", "Flex")  # contenders whose preparation takes seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AbsentError(Exception):
    """A contender that cannot run here; the text says why and is printed in the place of a time."""


@dataclass(frozen=True)
class Prepared:
    """`call()` is what is timed; `results(output)` names its tensors the way `Problem.truth` does."""

    call: Callable[[], Any]
    results: Callable[[Any], Results]


@dataclass(frozen=True)
class Contender:
    """`prepare()` does everything that is not timed (layouts, compilation, sessions), or raises AbsentError."""

    name: str
    prepare: Callable[[], Prepared]


@dataclass(frozen=True)
class Problem:
    """`truth` is float64, `plain` the reference in the case's dtype. The first contender is fastattn.

    rival_factor  how many times plain's error a rival may make before it is WRONG; fastattn may always make 2
    """

    truth: Results
    plain: Results
    contenders: list[Contender]
    rival_factor: float = FACTOR


@dataclass(frozen=True)
class Case:
    """One line of the table.

    room      attention, layer_norm, rms_norm, rope or latency
    row       what the line proves: "forward dense", "decode", ... ; lines of a row belong together
    bound     "flops", "copy" or "read": what the share of the attainable is a share of; "latency" has none
    work      floating point operations (bound flops) or bytes moved (copy, read) of one call
    malloc    "default", or "pinned": glibc keeps freed memory, so page faults are out of the comparison
    axis, x   for rows that are plotted: what is varied and its value here
    """

    room: str
    row: str
    label: str
    dtype: str
    bound: str
    work: float
    build: Callable[[], Problem] = field(repr=False)
    malloc: str = "default"
    threads: int | None = None
    axis: str = ""
    x: int = 0

    @property
    def key(self) -> str:
        threads = f"/{self.threads}t" if self.threads else ""
        return f"{self.room}/{self.row}/{self.label}/{self.dtype}/{self.malloc}{threads}"
