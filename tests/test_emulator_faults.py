"""The emulator finds planted mistakes, says what and where, and lets the same kernels pass without them.

Each kernel of emulator/kernels/faults.cuh makes the mistake that it is asked for; fault 0 is none.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import emulator
import pytest
import torch
from emulator.trial import trial

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++")
SEEDS = (0, 1, 2)
FILE = "faults.cuh"


def found(run: Any, fault: int, seed: int = 0) -> str:
    """The report that the mistake earns; it names the file and a line."""
    with pytest.raises(emulator.EmulatorError) as report:
        run(fault, seed)
    text = str(report.value)
    assert FILE + ":" in text or "hopper_faults.cuh:" in text
    return text


# ---- a ring of three stages filled by cp.async


def ring(fault: int, seed: int = 0) -> None:
    tiles = 7
    a = torch.arange(tiles * 128, dtype=torch.float32).view(tiles, 128)
    out = torch.zeros(128)
    trial("ring_kernel", out, a, file=FILE, threads=128, shared=3 * 512, n=tiles, fault=fault, seed=seed)
    torch.testing.assert_close(out, a.sum(0).roll(-1), rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_ring_passes(seed: int) -> None:
    ring(0, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        pytest.param(1, "race: reads shared memory|which was never written|while an", id="missing __syncthreads"),
        pytest.param(2, "while an asynchronous copy into it is under way", id="missing cp_async_wait"),
        pytest.param(3, "while an asynchronous copy into it is under way", id="wrong pending count"),
        pytest.param(4, "while an asynchronous copy into it is under way", id="wrong ring stage"),
        pytest.param(5, "race: |while an asynchronous copy", id="stage refilled while others read it"),
        pytest.param(6, "out of bounds: .*shared memory", id="ring index not wrapped"),
        pytest.param(7, "out of bounds: .*global memory at [0-9]+ bytes ", id="missing predicate at the tail"),
        pytest.param(8, "misaligned: cp.async reads 16 bytes", id="misaligned global address"),
        pytest.param(9, "while an asynchronous copy into it is under way", id="missing cp_async_commit"),
    ],
)
def test_mistakes_in_a_ring_are_found(fault: int, report: str, seed: int) -> None:
    assert re.search(report, found(ring, fault, seed))


# ---- a product through swizzled shared memory


def product(fault: int, seed: int = 0) -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    out = torch.zeros(8, 8)
    trial("product_kernel", out, a, b, file=FILE, shared=768, fault=fault, seed=seed)
    torch.testing.assert_close(out, (a.float() @ b.float().T)[:8], rtol=1e-5, atol=1e-5)


def test_a_right_product_passes() -> None:
    for seed in SEEDS:
        product(0, seed)


def test_a_wrong_swizzle_gives_wrong_numbers() -> None:
    with pytest.raises(AssertionError):
        product(1)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        pytest.param(2, "which was never written", id="uninitialised shared memory"),
        pytest.param(3, "race: reads shared memory", id="missing __syncwarp"),
        pytest.param(4, "lanes 0x80000000 have exited|exits while", id="lane exits before ldmatrix"),
        pytest.param(5, "divergent: reaches ldmatrix_x2", id="divergent ldmatrix"),
        pytest.param(6, "misaligned: ldmatrix reads 16 bytes", id="misaligned row"),
    ],
)
def test_mistakes_in_a_product_are_found(fault: int, report: str) -> None:
    for seed in SEEDS:
        assert re.search(report, found(product, fault, seed))


# ---- rows by blocks


def rows(fault: int, seed: int = 0) -> None:
    n = 100
    a = torch.randn(n)
    out = torch.zeros(2 * n)[::2] if fault == 8 else torch.zeros(n)
    trial("rows_kernel", out, a, file=FILE, threads=64, shared=256, grid=2, n=n, fault=fault, seed=seed)
    torch.testing.assert_close(out, a + 1)


def test_right_rows_pass() -> None:
    for seed in SEEDS:
        rows(0, seed)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        pytest.param(
            1, "out of bounds: reads 4 bytes of global memory at [0-9]+ bytes ", id="missing predicate on a load"
        ),
        pytest.param(2, "out of bounds: writes 4 bytes at byte 256 of shared memory", id="shared array too small"),
        pytest.param(3, "arrives at barrier 1 for .* where others came", id="barrier counts differ"),
        pytest.param(4, "deadlock, no thread can go on.*wait in a named barrier 1 .32 of 64", id="barrier never fills"),
        pytest.param(5, "divergent: lanes of one warp reach barrier 0", id="__syncthreads in a branch"),
        pytest.param(6, "out of bounds: writes 4 bytes of global memory", id="missing predicate on a store"),
        pytest.param(7, "race: writes byte 0 of out", id="two blocks write one element"),
        pytest.param(8, "which is no element of the tensor", id="a store between the rows of a view"),
        pytest.param(9, "race: (reads|writes) byte", id="sum without atomics"),
        pytest.param(10, "shuffles from lane 20, which does not take part", id="shuffle from outside of the mask"),
        pytest.param(11, "divergent: reaches", id="different collectives in a branch"),
        pytest.param(12, "misaligned: reads .* not a multiple of 8|race", id="misaligned vector"),
        pytest.param(13, "which lacks the calling lane", id="mask without the caller"),
        pytest.param(14, "__trap", id="trap"),
        pytest.param(15, "divergent: only lanes 0x0000ffff of warp", id="half a warp at a barrier"),
        pytest.param(16, "divergent: lanes of one warp reach barrier 1|a second time in one phase", id="arrival twice"),
    ],
)
def test_mistakes_in_rows_are_found(fault: int, report: str) -> None:
    for seed in SEEDS:
        assert re.search(report, found(rows, fault, seed), re.DOTALL)


def test_a_thread_may_poll_and_polling_for_ever_is_found() -> None:
    def run(fault: int, seed: int = 0) -> None:
        out = torch.zeros(1, dtype=torch.int32)
        trial("ticket_kernel", out, file=FILE, threads=64, fault=fault, seed=seed)
        assert out.item() == 64

    run(0)
    assert "livelock" in found(run, 1)


@pytest.mark.parametrize("fault", [0, 1, 2])
def test_a_turn_orders_blocks_when_it_is_passed_and_looked_at(fault: int) -> None:
    out = torch.zeros(2, 32)
    turn = functools.partial(
        trial, "turn_kernel", out, torch.zeros(1, dtype=torch.int32), file=FILE, grid=2, fault=fault
    )
    if fault:
        with pytest.raises(emulator.EmulatorError, match=r"race: reads .* block \(0, 0, 0\), thread .* nothing orders"):
            turn()
        return
    turn()
    assert out[1].tolist() == [32.0 - i for i in range(32)]
