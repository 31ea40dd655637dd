"""Times calls on a GPU with events: interleaved, from a cold L2 cache, without the host's launch time in between."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..timing import Timing

LEAST, MOST = 5, 40  # rounds
_AHEAD = 400_000  # clock cycles that the GPU waits for, about 0.2 ms, so that the host has queued the call by then


class Watch(Protocol):
    """Starts a call now and says later how many seconds it took."""

    def start(self, call: Callable[[], object]) -> Callable[[], float]: ...


class EventWatch:
    """CUDA events around each call, after a write of twice the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        properties: Any = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(2 * max(properties.L2_cache_size, 32 << 20), dtype=torch.int8, device=device)

    def start(self, call: Callable[[], object]) -> Callable[[], float]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD)
        before.record()
        call()
        after.record()

        def seconds() -> float:
            after.synchronize()
            return before.elapsed_time(after) / 1e3

        return seconds


class HostWatch:
    """The host's clock, for machines without a GPU: it proves the programs, not the speed."""

    def start(self, call: Callable[[], object]) -> Callable[[], float]:
        begin = time.perf_counter()
        call()
        elapsed = time.perf_counter() - begin
        return lambda: elapsed


def compilers() -> int:
    """Processes that may compile while the GPU is timed: the host that queues the calls must not wait for a core."""
    return max(1, (os.cpu_count() or 1) - 2)


def measure(calls: dict[str, Callable[[], object]], watch: Watch, budget_s: float) -> dict[str, Timing]:
    """Medians of every call, round by round in shuffled order, until the budget is spent or every call had `MOST`."""
    for call in calls.values():
        for _ in range(3):
            watch.start(call)()
    mix = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget_s
    for done in range(MOST):
        if done >= LEAST and time.perf_counter() > end:
            break
        order = list(calls)
        mix(order)
        waiting = [(name, watch.start(calls[name])) for name in order]
        for name, wait in waiting:
            seconds[name].append(wait())
    return {name: _summary(sorted(found)) for name, found in seconds.items()}


def _summary(found: list[float]) -> Timing:
    fifth = int(0.2 * (len(found) - 1))
    return Timing(statistics.median(found), found[fifth], found[-1 - fifth], len(found), len(found), noisy=False)
