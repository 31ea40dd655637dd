"""The emulator finds planted mistakes of sm_90's kind: phases, transaction counts, descriptors, proxies, clusters."""

from __future__ import annotations

import re
from typing import Any

import emulator
import pytest
import torch
from emulator.trial import trial

from fastattn.runtime.cuda import TensorMap

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++")
SEEDS = (0, 1, 2, 3)  # odd ones let copies land early
FILE = "hopper_faults.cuh"


def product(fault: int, seed: int = 0) -> None:
    """Five tiles through a ring of two, TMA in and out, wgmma between."""
    tiles = 5
    a, b = torch.randn(64, 64 * tiles).bfloat16(), torch.randn(64, 64 * tiles).bfloat16()
    out = torch.zeros(64, 64, dtype=torch.bfloat16)
    maps = tuple(TensorMap(t, t.shape[::-1], (t.shape[1],), (64, 64), 128) for t in (a, b, out))
    shared = 5 * 8192 + 32
    trial(
        "product_kernel", out, a, b, file=FILE, threads=384, shared=shared, n=tiles, fault=fault, maps=maps, seed=seed
    )
    torch.testing.assert_close(out, (a.float() @ b.float().T).bfloat16(), rtol=2e-2, atol=2e-2)


def plain_product(fault: int, seed: int = 0) -> None:
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    out = torch.zeros(64, 8)
    trial("plain_product_kernel", out, a, b, file=FILE, threads=128, shared=2304, fault=fault, seed=seed)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def neighbours(fault: int, seed: int = 0) -> None:
    out = torch.zeros(2)
    trial("neighbour_kernel", out, file=FILE, grid=2, cluster=2, shared=16, fault=fault, seed=seed)
    assert out.tolist() == [2, 1]


def hand_over(fault: int, seed: int = 0) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    trial("hand_over_kernel", out, file=FILE, threads=64, shared=32, n=40, fault=fault, seed=seed)
    assert out.tolist() == [sum(range(40))] * 32


def registers(fault: int, seed: int = 0, threads: int = 256) -> None:
    out = torch.zeros(2)
    trial("registers_kernel", out, file=FILE, threads=threads, fault=fault, seed=seed)
    assert out.tolist() == [1, 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("run", [product, plain_product, neighbours, hand_over, registers])
def test_without_a_mistake_they_pass(run: Any, seed: int) -> None:
    run(0, seed)
    if run is neighbours:
        run(5, seed)
    if run is product:
        run(25, seed)


def test_a_block_is_no_larger_than_its_launch_bounds() -> None:
    with pytest.raises(emulator.EmulatorError, match="384 threads, of which its __launch_bounds__ allow 256"):
        registers(0, threads=384)


TOO_EARLY = "while an asynchronous copy into it is under way|race: |never written"
UNFENCED = "fence_async_shared by that thread and then a barrier are missing"
MISTAKES = {
    "arrivals: one too many awaited": (product, 1, "deadlock.*awaits 1 of 5 arrivals"),
    "missing fence_barrier_init": (product, 2, "initialised without fence_barrier_init"),
    "barriers used before they are made": (product, 3, "no mbarrier was initialised|no barrier orders"),
    "producer does not wait for empty": (product, 4, "a bulk load writes|arrivals of phase 0 have come already"),
    "producer waits for the wrong phase": (product, 5, "deadlock.*mbarrier_wait for parity 0"),
    "transaction count too large": (product, 6, "deadlock.*awaits . of 1 arrivals and 16 bytes"),
    "transaction count too small": (product, 7, f"wrong transaction count|{TOO_EARLY}"),
    "tile off its swizzle": (product, 8, "misaligned: tma_load .* not a multiple of 1024"),
    "registers over the budget": (product, 9, "deadlock.*registers_raise .the block's registers are taken"),
    "consumer waits for the wrong phase": (product, 10, TOO_EARLY),
    "missing wgmma_fence": (product, 11, "wgmma without wgmma_fence"),
    "descriptor stride too small": (product, 12, "the descriptor's offsets .leading 16, stride 512. overlap"),
    "descriptor stride too large": (product, 13, f"out of bounds: wgmma .operand b. reads|{TOO_EARLY}"),
    "descriptor with the wrong swizzle": (product, 14, "with a swizzle of 64 bytes what tma_load wrote with another"),
    "operand begins within a swizzle's atom": (product, 23, "within an atom of the 128-byte swizzle"),
    "one warp skips a product": (product, 15, "the warps of a warpgroup issue different products"),
    "stage released before wgmma_wait": (product, 16, "a bulk load writes shared memory .* which wgmma at .* read"),
    "missing wgmma_wait": (product, 17, "is still computing|which wgmma at .* read"),
    "staging written again too early": (product, 18, "writes shared memory .* which a bulk store at .* read"),
    "named barrier counts differ": (product, 19, "arrives at barrier 1 for"),
    "missing proxy fence before a store": (product, 20, UNFENCED),
    "missing barrier before a store": (product, 21, f"race: a bulk store reads|{UNFENCED}"),
    "missing bulk_wait_read": (product, 22, "bulk_wait_read is missing"),
    "missing proxy fence before wgmma": (plain_product, 1, f"wgmma .operand .. reads .*{UNFENCED}"),
    "proxy fence behind the barrier": (plain_product, 2, UNFENCED),
    "operand overwritten under wgmma": (plain_product, 3, "race: writes shared memory .* which wgmma at .* read"),
    "accumulator read before the wait": (plain_product, 4, "a register that wgmma at .* is still computing"),
    "tile overwritten by TMA behind ordinary reads": (product, 24, f"a bulk load writes .* read.*{UNFENCED}"),
    "accumulator written behind wgmma_fence": (product, 26, "writes a register behind wgmma_fence"),
    "mbarrier made twice": (product, 27, "mbarrier_init of an mbarrier"),
    "descriptor of a tile off 16 bytes": (plain_product, 5, "an argument that the hardware does not take"),
    "read as constant what the kernel wrote": (plain_product, 6, "as constant .ld.global.nc., which the kernel wrote"),
    "more registers than two blocks leave": (registers, 1, "deadlock.*the block's registers are taken"),
    "one warp keeps its registers": (registers, 2, "do not change their registers equally often"),
    "registers lowered to more": (registers, 3, "registers_lower to 160, where the warp has 128"),
    "registers raised to fewer": (registers, 4, "registers_raise to 32, where the warp has 40"),
    "warps of a group raise at two places": (registers, 5, "change their registers at different places"),
    "a lane leaves before the cluster's barrier": (neighbours, 6, "needs all 32 lanes|exits while"),
    "missing cluster_sync": (neighbours, 1, "never written|race: reads"),
    "two arrivals at the cluster's barrier": (neighbours, 7, "cluster_arrive twice without cluster_wait"),
    "two waits at the cluster's barrier": (neighbours, 8, "cluster_wait without cluster_arrive"),
    "a lane frees a slot that others still wait for": (
        hand_over,
        1,
        "a full turn to phase|deadlock.*mbarrier_wait for",
    ),
    "a store to a block that may not have started": (
        neighbours,
        9,
        "store_cluster to block [01] of the cluster, which may not have started yet",
    ),
    "no such block in the cluster": (neighbours, 2, "load_cluster from block 2 of a cluster of 2"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str, seed: int) -> None:
    run, fault, report = MISTAKES[mistake]
    with pytest.raises(emulator.EmulatorError) as found:
        run(fault, seed)
    assert re.search(report, str(found.value), re.DOTALL)
    assert f"{FILE}:" in str(found.value)


@pytest.mark.parametrize("fault", [3, 4])
def test_a_block_that_ends_while_others_read_its_memory_is_found_when_it_is_the_quicker_one(fault: int) -> None:
    reports = []
    for seed in range(8):
        try:
            neighbours(fault, seed)
        except emulator.EmulatorError as error:
            reports.append(str(error))
    assert reports and all("which has ended" in text for text in reports)
