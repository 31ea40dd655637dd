"""Interleaved timing on a machine that other people also use.

A busy neighbour halves a virtual machine for minutes while `steal` stays 0, so two programs timed one after the other
compare the neighbours. Here all contenders of a case run in one process, round by round in shuffled order, and a short
burst of multiply-adds (the canary) before and after each sample tells whether the machine was ours: a sample counts
only if both bursts reached `QUIET` of the best burst seen. Other programs on the same system are seen more directly: the
kernel counts how long our threads were ready to run but had to wait. The medians of the samples that count are printed.
"""

from __future__ import annotations

import glob
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

QUIET = 0.88  # of the best canary; a shared core shows as about 0.5, clock noise as 0.95
WAITED = 0.05  # of a sample's time that all threads together may have waited for a core
SAMPLE_S = 1e-3  # a sample repeats short calls until it is this long
WARM_S = 4e-3  # after a pause: longer than a worker of the previous contender spins for work
ENOUGH = 9  # quiet samples per contender that end a case early

Clock = Callable[[], float]


class Canary:
    """Whether the machine was ours. `probe()` returns a rate, judged against the best seen so far; `waited()` returns
    the seconds that this process's threads have waited for a core."""

    def __init__(self, probe: Callable[[], float] | None, waited: Callable[[], float] = lambda: 0.0) -> None:
        self._probe, self.waited = probe, waited
        self.best = 0.0

    @classmethod
    def of_machine(cls, num_threads: int) -> Canary:
        """2 ms of fp32 multiply-adds on every thread; without the native module every sample counts."""
        from fastattn.runtime import native

        if native.error() is not None:
            return cls(None, waited_for_a_core)
        peak = native.module().fma_peak
        return cls(lambda: peak("fp32", 2e-3, num_threads), waited_for_a_core)

    def sing(self) -> float:
        if self._probe is None:
            return 0.0
        rate = self._probe()
        self.best = max(self.best, rate)
        return rate

    def quiet(self, before: float, after: float) -> bool:
        return min(before, after) >= QUIET * self.best


def waited_for_a_core() -> float:
    """Seconds that the threads of this process were ready to run but did not, since their start; 0 where unknown."""
    total = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        try:
            with open(path) as file:
                total += int(file.read().split()[1])
        except (OSError, IndexError):  # a thread that just ended, or a kernel without these counters
            continue
    return total / 1e9


@dataclass
class Samples:
    """Seconds per call, each with the canaries around it: the best canary may come later and unmask an early sample.

    A sample that waited for a core more than it may has canaries of -1, below any threshold.
    """

    seconds: list[float] = field(default_factory=list)
    canaries: list[tuple[float, float]] = field(default_factory=list)

    def quiet(self, canary: Canary) -> list[float]:
        return [s for s, (a, b) in zip(self.seconds, self.canaries, strict=True) if canary.quiet(a, b)]

    def add(self, call: Callable[[], object], repeats: int, canary: Canary, before: float, clock: Clock) -> None:
        """Time `repeats` calls; `before` is the canary that sang before their warm-up."""
        waited, start = canary.waited(), clock()
        for _ in range(repeats):
            call()
        elapsed = clock() - start
        waited = canary.waited() - waited
        after = canary.sing()
        self.seconds.append(elapsed / repeats)
        self.canaries.append((before, after) if waited <= WAITED * elapsed else (-1.0, -1.0))


@dataclass(frozen=True)
class Timing:
    """Median and 20 % / 80 % quantiles in seconds per call. `noisy`: fewer than three quiet samples, so all count."""

    median: float
    p20: float
    p80: float
    samples: int
    quiet: int
    noisy: bool


def summarise(samples: Samples, canary: Canary) -> Timing:
    quiet = samples.quiet(canary)
    noisy = len(quiet) < 3
    used = sorted(samples.seconds if noisy else quiet)
    return Timing(
        statistics.median(used),
        used[int(0.2 * (len(used) - 1))],
        used[-1 - int(0.2 * (len(used) - 1))],
        len(samples.seconds),
        len(quiet),
        noisy,
    )


def measure(
    calls: dict[str, Callable[[], object]],
    canary: Canary,
    *,
    budget_s: float,
    clock: Clock = time.perf_counter,
    shuffle: Callable[[list[str]], None] | None = None,
) -> dict[str, Timing]:
    """Time every call of one case, interleaved, until each has `ENOUGH` quiet samples or the budget is spent.

    Every contender gets at least three samples, whatever the budget: a median of one is a rumour.
    """
    if not calls:
        return {}
    mix = shuffle or random.Random(0).shuffle
    once = {name: _once(call, clock) for name, call in calls.items()}
    samples = {name: Samples() for name in calls}
    end = clock() + budget_s
    rounds = 0
    while rounds < 3 or clock() < end:
        order: list[str] = list(calls)
        mix(order)
        for name in order:
            _sample(calls[name], once[name], samples[name], canary, clock)
        rounds += 1
        if all(len(s.quiet(canary)) >= ENOUGH for s in samples.values()):
            break
    return {name: summarise(s, canary) for name, s in samples.items()}


def _once(call: Callable[[], object], clock: Clock) -> float:
    """About how long one warm call takes; a call so long that its first costs do not matter is made only once."""
    for _ in range(2):
        start = clock()
        call()
        seconds = clock() - start
        if seconds >= 20 * WARM_S:
            break
    return seconds


def _sample(call: Callable[[], object], once: float, samples: Samples, canary: Canary, clock: Clock) -> None:
    before = canary.sing()
    if once < 10 * WARM_S:
        start = clock()
        while True:
            call()
            if clock() - start >= WARM_S:
                break
    samples.add(call, max(1, min(100_000, round(SAMPLE_S / max(once, 1e-7)))), canary, before, clock)


def ratio(rival: Timing, ours: Timing) -> float:
    """How many times faster ours is; above 1 we win."""
    return rival.median / ours.median


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
