"""The emulator's sm_90 verbs, each alone against its documented layout: TMA, bulk copies, wgmma, barriers, clusters."""

from __future__ import annotations

import functools
from typing import Any

import emulator
import pytest
import torch
from emulator import trial as trials

from fastattn.runtime.cuda import TensorMap

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++")
SEEDS = (0, 1)  # odd ones let copies land early
trial = functools.partial(trials.trial, file="hopper_verbs.cuh")


def box_of(x: torch.Tensor, start: tuple[int, ...], box: tuple[int, ...]) -> torch.Tensor:
    """x[start : start + box] with zeros outside; outermost first."""
    out = torch.zeros(box, dtype=x.dtype)
    here = tuple(slice(max(0, -s), min(n, size - s)) for s, n, size in zip(start, box, x.shape, strict=True))
    there = tuple(slice(max(0, s), min(size, s + n)) for s, n, size in zip(start, box, x.shape, strict=True))
    if all(h.stop > h.start for h in here):
        out[here] = x[there]
    return out


def swizzled(rows: torch.Tensor, span: int) -> torch.Tensor:
    """Bytes [n, span] with the 16-byte pieces of each row where the copy engine puts them."""
    pieces = rows.reshape(-1, span // 16, 16)
    out = torch.empty_like(pieces)
    for r in range(pieces.shape[0]):
        key = r * span // 128 % (span // 16)
        for c in range(span // 16):
            out[r, c ^ key] = pieces[r, c]
    return out.reshape(-1)


BOXES = [
    pytest.param((40, 64), (0, 0), (16, 64), 128, id="whole"),
    pytest.param((40, 64), (33, 0), (16, 64), 128, id="beyond the end"),
    pytest.param((40, 72), (-3, 40), (16, 64), 128, id="before the start, columns cut"),
    pytest.param((40, 32), (8, -8), (24, 32), 64, id="64 bytes, columns before the start"),
    pytest.param((40, 16), (30, 0), (16, 16), 32, id="32 bytes"),
    pytest.param((9, 24), (5, 4), (8, 24), 0, id="no swizzle"),
    pytest.param((3, 9, 16), (1, 7, 0), (2, 4, 16), 32, id="rank 3"),
    pytest.param((2, 3, 9, 64), (1, -1, 6, 0), (1, 2, 8, 64), 128, id="rank 4"),
    pytest.param((2, 2, 3, 9, 64), (1, 0, 2, 6, 0), (1, 2, 2, 8, 64), 128, id="rank 5"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("shape", "start", "box", "swizzle"), BOXES)
def test_tma_moves_boxes(shape: Any, start: Any, box: Any, swizzle: int, seed: int) -> None:
    x = torch.randint(-8, 8, shape).bfloat16()
    y = torch.randint(-8, 8, shape).bfloat16()
    maps = []
    for t in (x, y):
        strides = tuple(reversed(t.stride()[:-1]))
        maps.append(TensorMap(t, shape[::-1], strides, box[::-1], swizzle))
    tile = box_of(x, start, box)
    raw = torch.zeros(tile.numel() * 2, dtype=torch.uint8)
    expected = y.clone()
    origin = tuple(slice(0, min(n, size)) for n, size in zip(box, shape, strict=True))
    expected[origin] = tile[origin]
    expected += box_of(tile, tuple(-s for s in start), shape)
    coordinates = torch.tensor(start[::-1], dtype=torch.int32)
    trial(
        "box_kernel",
        raw,
        b=coordinates,
        constants=(str(len(shape)),),
        shared=-(-raw.numel() // 1024) * 1024 + 8,
        n=raw.numel(),
        maps=(maps[0], None, maps[1]),
        seed=seed,
    )
    flat = tile.reshape(-1, box[-1]).view(torch.uint8)
    assert raw.tolist() == (swizzled(flat, swizzle) if swizzle else flat.reshape(-1)).tolist()
    assert y.tolist() == expected.tolist()


def test_tma_knows_its_rules() -> None:
    x = torch.zeros(4, 60).bfloat16()
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        trial("box_kernel", x, constants=("2",), maps=(TensorMap(x, (60, 4), (60,), (8, 4)),))
    narrow = TensorMap(torch.zeros(4, 64).bfloat16(), (64, 4), (64,), (32, 4), 128)
    with pytest.raises(emulator.EmulatorError, match="rows of 64 bytes with a swizzle of 128"):
        trial(
            "box_kernel", x, b=torch.zeros(2, dtype=torch.int32), constants=("2",), shared=1032, n=256, maps=(narrow,)
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_copies_add_and_reach_every_block(seed: int) -> None:
    n = 64
    a, b, out = torch.randn(n), torch.randn(1, n), torch.randn(4, n)
    expected = torch.stack((a, out[1] + a, b[0], b[0]))
    maps = (None, TensorMap(b, (n, 1), (n,), (n, 1)))
    shared = 2 * 4 * n + 16
    trial("bulk_kernel", out, a, b, grid=2, cluster=2, shared=shared, n=n, maps=maps, seed=seed)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


WGMMAS = [
    pytest.param("bf16", 64, 128, 0, 0, 4, 0, id="k-major both, 128 bytes"),
    pytest.param("f16", 64, 128, 0, 0, 8, 2, id="f16, two parts of k, accumulating"),
    pytest.param("bf16", 24, 64, 0, 0, 2, 0, id="64 bytes, N 24"),
    pytest.param("bf16", 8, 32, 0, 0, 1, 2, id="32 bytes, N 8"),
    pytest.param("bf16", 256, 128, 0, 1, 4, 3, id="a in registers, b mn-major, N 256"),
    pytest.param("f16", 128, 128, 1, 1, 2, 0, id="both mn-major"),
    pytest.param("bf16", 32, 64, 1, 1, 2, 2, id="both mn-major, 64 bytes"),
    pytest.param("bf16", 16, 32, 1, 0, 1, 0, id="a mn-major, 32 bytes"),
]


@pytest.mark.parametrize(("kind", "n", "swizzle", "transpose_a", "transpose_b", "steps", "ways"), WGMMAS)
def test_wgmma_multiplies_tiles_that_tma_brought(
    kind: str, n: int, swizzle: int, transpose_a: int, transpose_b: int, steps: int, ways: int
) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b, out = torch.randn(64, 16 * steps).to(dtype), torch.randn(n, 16 * steps).to(dtype), torch.randn(64, n)
    expected = a.float() @ b.float().T + (out if ways & 2 else 0)
    lying = [t.T.contiguous() if turned else t for t, turned in ((a, transpose_a), (b, transpose_b))]
    wide = swizzle // 2
    maps = tuple(TensorMap(t, t.shape[::-1], (t.shape[1],), (wide, t.shape[0]), swizzle) for t in lying)
    shared = 64 * 32 * steps + 1024 + n * 32 * steps + 16
    constants = (kind, str(n), str(swizzle), str(transpose_a), str(transpose_b), str(steps))
    for seed in SEEDS:
        result = out.clone()
        trial(
            "wgmma_kernel", result, a, constants=constants, threads=128, shared=shared, fault=ways, maps=maps, seed=seed
        )
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_named_barriers_hand_over_a_slot() -> None:
    a, out = torch.randn(5), torch.zeros(64)
    for seed in SEEDS:
        trial("handover_kernel", out, a, threads=96, shared=4, n=5, seed=seed)
        torch.testing.assert_close(out, a.sum().expand(64))


@pytest.mark.parametrize("blocks", [2, 8, 16])
def test_clusters_exchange_through_shared_memory(blocks: int) -> None:
    out = torch.zeros(blocks)
    trial("exchange_kernel", out, grid=blocks, cluster=blocks, shared=80)
    assert out.tolist() == [blocks * (blocks + 1) / 2] * blocks
