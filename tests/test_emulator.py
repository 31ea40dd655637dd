"""The emulator's sm_80 verbs and NVRTC's builtins, each alone against its documented layout or rounding."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import emulator
import pytest
import torch
from emulator import build
from emulator import trial as trials

from fastattn.runtime import sources

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++")
trial = functools.partial(trials.trial, file="verbs.cuh")
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("kind", TYPES)
def test_mma_multiplies_its_fragments(kind: str) -> None:
    a, b = torch.randn(16, 16).to(TYPES[kind]), torch.randn(16, 8).to(TYPES[kind])
    out = torch.randn(16, 8)
    expected = out.double() + a.double() @ b.double()
    trial("mma_kernel", out, a, b, constants=(kind,))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def fragments(matrices: torch.Tensor, transposed: bool) -> torch.Tensor:
    """What lane l holds of each 8x8 matrix: [l / 4][2 (l % 4)] and the next, as [32, matrices, 2]."""
    if transposed:
        matrices = matrices.transpose(1, 2)
    return matrices.reshape(len(matrices), 32, 2).transpose(0, 1)


@pytest.mark.parametrize(("way", "count", "transposed"), [(0, 4, False), (1, 4, True), (2, 2, False), (3, 2, True)])
def test_ldmatrix_and_stmatrix_move_fragments(way: int, count: int, transposed: bool) -> None:
    matrices = torch.randint(0, 1 << 15, (4, 8, 8), dtype=torch.int16)
    held = fragments(matrices[:count], transposed)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    trial("ldmatrix_kernel", out, matrices, n=way)
    assert torch.equal(out[:, :count], held)

    registers = torch.zeros(32, 4, 2, dtype=torch.int16)
    registers[:, :count] = held
    back = torch.zeros(4, 8, 8, dtype=torch.int16)
    trial("stmatrix_kernel", back, registers, n=way)
    assert torch.equal(back[:count], matrices[:count])


@pytest.mark.parametrize("n", [0, 16, 208, 512])
def test_cp_async_copies_or_fills_with_zeros(n: int) -> None:
    a = torch.randint(1, 255, (512,), dtype=torch.uint8)
    out = torch.full((1024,), 7, dtype=torch.uint8)
    trial("cp_async_kernel", out, a, n=n)
    expected = torch.where(torch.arange(512) < n, a, 0).to(torch.uint8)
    assert torch.equal(out, expected.repeat(2))


def hard_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every kind of float32: ties in both directions, the limits of the type, subnormals, infinities, NaN."""
    limits = torch.finfo(dtype)
    exact = torch.randn(2000).to(dtype).float() * torch.logspace(-40, 38, 2000, base=10)
    near = exact.to(dtype).float()
    ties = (near.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(torch.float32)
    edges = torch.tensor(
        [limits.max, limits.max * 1.001, limits.max * 1.01, limits.tiny, limits.tiny / 3, 65519.9, 65520.0]
    )
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 5.96e-8, 2.98e-8, 3.0e-8])
    random = torch.randint(-(1 << 31), (1 << 31) - 1, (4000,), dtype=torch.int32).view(torch.float32)
    return torch.cat((exact, ties, edges, -edges, special, random))


@pytest.mark.parametrize("kind", TYPES)
def test_conversions_round_to_nearest_even(kind: str) -> None:
    x = hard_numbers(TYPES[kind])
    out = torch.zeros(len(x), 4, dtype=torch.int32)
    trial("convert_kernel", out, x, constants=(kind,), n=len(x))
    rounded = x.to(TYPES[kind])
    bits = rounded.view(torch.int16).to(torch.int32) & 0xFFFF
    bits[x.isnan()] = 0x7FFF
    one = torch.ones(()).to(TYPES[kind]).view(torch.int16).item()
    assert torch.equal(out[:, 0], bits)
    assert torch.equal(out[:, 1], bits | one << 16)
    number = ~x.isnan()
    assert torch.equal(out[number, 2], rounded.float().view(torch.int32)[number])
    assert bool((out[:, 3] == 1).all())


def test_approximations_keep_their_documented_errors() -> None:
    x = torch.cat(
        (torch.randn(3000) * 20, torch.logspace(-37, 37, 3000), torch.tensor([0.0, 1.0, -float("inf"), 1e-42]))
    )
    out = torch.zeros(len(x), 3)
    trial("math_kernel", out, x, n=len(x))
    exact = x.double()
    plain = (exact.abs() < 100) & (exact.abs() > 1e-36)
    positive = plain & (exact > 0)
    power, inverse = torch.exp2(exact), 1 / exact
    assert float(((out[:, 0] - power) / power)[plain].abs().max()) <= 2**-22
    assert float((out[:, 1] - exact.log2())[positive].abs().max()) <= 2**-22 * float(exact.log2()[positive].abs().max())
    assert float(((out[:, 2] - inverse) / inverse)[plain].abs().max()) <= 2**-23
    assert out[-4:, 0].tolist() == [1, 2, 0, 1]  # subnormal arguments are zeros
    assert out[-1, 1] == -float("inf")
    assert out[-4, 1] == -float("inf")


def test_builtins_mean_what_cuda_says() -> None:
    t, lane = torch.arange(64), torch.arange(64) % 32
    for seed in range(3):
        out = torch.zeros(8, 64, dtype=torch.int32)
        trial("builtin_kernel", out, threads=64, shared=4, seed=seed)
        assert out[0].tolist() == (t // 8 * 8 + 5).tolist()
        assert out[1].tolist() == torch.where(lane >= 3, t - 3, t).tolist()
        assert out[2].tolist() == torch.where(t % 16 + 3 < 16, t + 3, t).tolist()
        assert out[3].tolist() == (t ^ 9).tolist()
        ballots = [sum(1 << (i % 32) for i in range(w, w + 32) if i % 3 == 0) for w in (0, 32)]
        assert [x & 0xFFFFFFFF for x in out[4].tolist()] == [ballots[i // 32] for i in range(64)]
        assert out[5].tolist() == [(i >= 32) + 2 * (i < 32) + 4 * (i % 32 < 8) for i in range(64)]
        assert out[6].tolist() == [16 + 1000 + 10000 + 1600000] * 64
        assert sorted(out[7].tolist()) == t.tolist()


def test_the_seed_decides_the_order_and_nothing_else_does() -> None:
    def tickets(seed: int) -> list[int]:
        out = torch.zeros(8, 64, dtype=torch.int32)
        trial("builtin_kernel", out, threads=64, shared=4, seed=seed)
        return out[7].tolist()

    assert tickets(4) == tickets(4)
    assert len({tuple(tickets(seed)) for seed in range(4)}) > 1


def test_a_kernel_that_does_not_compile_shows_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match="no_such_type"):
        trial("mma_kernel", torch.zeros(1), constants=("no_such_type",))


def test_more_than_a_block_may_have_is_refused() -> None:
    with pytest.raises(emulator.EmulatorError, match="bytes of shared memory"):
        trial("mma_kernel", torch.zeros(1), constants=("bf16",), shared=228 * 1024)
    with pytest.raises(emulator.EmulatorError, match="does not divide into clusters of 2"):
        trial("mma_kernel", torch.zeros(1), constants=("bf16",), grid=3, cluster=2)


def test_every_verb_has_its_stand_in() -> None:
    def verbs(folder: Path) -> dict[str, set[str]]:
        found = re.compile(r"^(?:template <[^>]*>\s)?__forceinline__ [^(]*?(\w+)(?:<\w+>)?\(", re.MULTILINE)
        return {file.name: set(found.findall(file.read_text())) for file in folder.glob("*.cuh")}

    place = sources.folder() / "ptx"
    real, ours = verbs(place), verbs(build.HERE / "ptx")
    with_asm = {name for name in real if "asm" in (place / name).read_text().replace("No asm", "")}
    assert with_asm <= ours.keys() <= real.keys()  # a header without asm is taken as it is
    assert all(real[name] and real[name] <= ours[name] for name in ours)


def test_libraries_are_compiled_once() -> None:
    trial("math_kernel", torch.zeros(1, 4), torch.zeros(1), n=1)
    before = {p: p.stat().st_mtime_ns for p in build.cache().glob("math_kernel-*.so")}
    build.load.cache_clear()
    trial("math_kernel", torch.zeros(1, 4), torch.zeros(1), n=1)
    assert {p: p.stat().st_mtime_ns for p in build.cache().glob("math_kernel-*.so")} == before
