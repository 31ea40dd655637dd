"""Blocks that run at the same time. What blocks owe each other shows only there: one after another, a turn has always come, and
whoever draws from a counter of the grid comes behind all that earlier blocks did."""

from __future__ import annotations

import functools

import emulator
import pytest
import torch
from emulator.trial import trial

from fastattn.ops.attention import _cuda, _reference, attention, tuning_cuda_bwd
from fastattn.runtime import cuda

pytestmark = [
    pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the order of blocks is the emulator's"),
]
SEEDS = (0, 1)


def add_in_turns(fault: int, seed: int, together: int) -> None:
    counts, out = torch.zeros(2, dtype=torch.int32), torch.zeros(64)
    trial("sums_kernel", out, counts, file="faults.cuh", threads=64, grid=8, fault=fault, seed=seed, together=together)
    assert out.tolist() == [8.0] * 64 and counts.tolist() == [8, 8]


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_take_turns_pass(seed: int) -> None:
    add_in_turns(0, seed, together=8)
    add_in_turns(0, seed, together=3)  # 2 divide the grid


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", [pytest.param(1, id="not awaited"), pytest.param(2, id="passed before a barrier")])
def test_a_turn_taken_wrongly_is_found_among_blocks_at_once_and_not_one_by_one(fault: int, seed: int) -> None:
    add_in_turns(fault, seed, together=1)
    with pytest.raises(emulator.EmulatorError, match=r"race: .* nothing orders the two"):
        add_in_turns(fault, seed, together=8)


HIDDEN = torch.rand(1, 1, 150, 128, generator=torch.Generator().manual_seed(1)) > 0.3
HIDDEN[..., :32] = False  # the first to have a turn has nothing to add
HIDDEN[..., :40, 64:96] = False  # nor has one in the middle
CALLS = {
    "causal": (tuning_cuda_bwd.Row(0, 256, False, tuning_cuda_bwd.Dkdv(32, 32, 2, 1), "ordered"), {"causal": True}),
    "mask": (tuning_cuda_bwd.Row(0, 256, True, tuning_cuda_bwd.Dkdv(32, 32, 1, 2), "ordered"), {"mask": HIDDEN}),
}


@pytest.mark.parametrize("call", CALLS)
def test_dq_has_the_same_bits_however_blocks_of_keys_meet(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of the grid take their turns at once, each order of theirs gives the sums of one after another."""
    row, options = CALLS[call]
    monkeypatch.setattr(_cuda, "forward", _reference.forward)
    q, k, v = (torch.randn(1, n, 2, 32).bfloat16().requires_grad_() for n in (150, 128, 128))

    def gradients(**order: int) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(cuda, "emulator", functools.partial(emulator.run, **order))
        with cuda.portable(), tuning_cuda_bwd.tried(row):
            o = attention(q, k, v, backend="cuda", **options)
            return torch.autograd.grad(o.float().square().sum(), (q, k, v))

    expected = gradients()
    for seed in SEEDS:
        for found, wanted in zip(gradients(seed=seed, together=16), expected, strict=True):
            assert torch.equal(found, wanted)
