"""Lanes, warps, warpgroups and blocks lag as far as nothing holds them, or run ahead of all others: a role that gives a place back
when one of its lanes is done with it must know that the others are. Work without a tile is where nothing else holds them."""

from __future__ import annotations

import functools
from typing import Any

import emulator
import pytest
import torch

from fastattn.ops.attention import attention, reference, tuning_sm90, tuning_sm90_bwd
from fastattn.runtime import cuda

pytestmark = [
    pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the order of threads is the emulator's"),
]
LAGGARDS = ("lane", "lanes", "warp", "warpgroup", "all but lane", "all but warp", "all but warpgroup")
SEEDS = (1, 2, 7)


@pytest.fixture(autouse=True)
def one_block_does_all(monkeypatch):
    monkeypatch.setattr(cuda, "EMULATED_SMS", 1)


def lags(monkeypatch: pytest.MonkeyPatch, lag: str, seed: int) -> None:
    monkeypatch.setattr(cuda, "emulator", functools.partial(emulator.run, lag=lag, seed=seed))


@pytest.mark.parametrize("lag", LAGGARDS)
def test_queries_without_keys_pass_a_persistent_block_one_after_another(lag, monkeypatch):
    """q's memory is given back at once where no key is seen, and the next queries may come at once."""
    q, k = (torch.randn(1, seqlen, 2, 64, dtype=torch.float16) for seqlen in (400, 8))
    row = tuning_sm90.find(64, 64, "band")
    ways = frozenset(("overlap", "pingpong", "lazy", "apart"))
    for seed in SEEDS:
        lags(monkeypatch, lag, seed)
        with tuning_sm90.tried(row._replace(BLOCK_M=192, BLOCK_N=80, stages=2, ways=ways)):
            o = attention(q, k, k, backend="cuda", causal=True)
        torch.testing.assert_close(o, reference.attention(q, k, k, causal=True), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("lag", LAGGARDS)
def test_keys_without_queries_pass_a_persistent_block_one_after_another(lag, monkeypatch):
    """k's and v's memory is given back at once where no query sees them, and the place of the block's work is drawn into again."""
    q, k, v = (torch.randn(1, n, 2, width).bfloat16() for n, width in ((8, 192), (400, 192), (400, 128)))
    row = tuning_sm90_bwd.find(192, 128, "plain")
    assert row is not None
    for seed in SEEDS:
        lags(monkeypatch, lag, seed)
        with tuning_sm90_bwd.tried(row._replace(ways=frozenset(("ahead", "persistent")))):
            o = attention(q, k.requires_grad_(), v, backend="cuda", causal="upper_left")
            (dk,) = torch.autograd.grad(o.float().square().sum(), k)
        assert bool((dk[:, 8:] == 0).all()) and bool((dk[:, :8] != 0).any())


@pytest.mark.parametrize("lag", ["block", "all but block"])
def test_persistent_blocks_at_once_give_the_bits_of_one_after_another(lag, monkeypatch):
    """Each of three blocks has one work and finds no second one; their turns at dq are taken while the others run."""
    monkeypatch.setattr(cuda, "EMULATED_SMS", 3)
    q, k, v = (torch.randn(1, n, h, width).bfloat16() for n, h, width in ((100, 1, 192), (197, 1, 192), (197, 1, 128)))
    row = tuning_sm90_bwd.find(192, 128, "plain")
    assert row is not None

    def gradient(**order: Any) -> torch.Tensor:
        monkeypatch.setattr(cuda, "emulator", functools.partial(emulator.run, **order))
        with tuning_sm90_bwd.tried(row._replace(ways=frozenset(("ahead", "ordered", "persistent")))):
            o = attention(q.requires_grad_(), k, v, backend="cuda", causal=True)
            return torch.autograd.grad(o.float().square().sum(), q)[0]

    expected = gradient()
    for seed in SEEDS[:2]:
        assert torch.equal(gradient(together=3, lag=lag, seed=seed), expected)
