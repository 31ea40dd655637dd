"""Lanes of a warp lag as far as no barrier holds them: a role that gives a place back when one of its lanes is done with it must
know that the others are. Work without a tile is where nothing else holds them."""

from __future__ import annotations

import functools

import emulator
import pytest
import torch

from fastattn.ops.attention import attention, reference, tuning_sm90, tuning_sm90_bwd
from fastattn.runtime import cuda

pytestmark = [
    pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the order of threads is the emulator's"),
]


@pytest.mark.parametrize("seed", [1, 3])
def test_queries_without_keys_pass_a_persistent_block_one_after_another(seed, monkeypatch):
    """q's memory is given back at once where no key is seen, and the next queries may come at once."""
    monkeypatch.setattr(cuda, "emulator", functools.partial(emulator.run, seed=seed))
    q, k = (torch.randn(1, seqlen, 2, 64, dtype=torch.float16) for seqlen in (1300, 8))
    row = tuning_sm90.find(64, 64, "band")
    ways = frozenset(("overlap", "pingpong", "lazy", "apart"))
    with tuning_sm90.tried(row._replace(BLOCK_M=192, BLOCK_N=80, stages=2, ways=ways)):
        o = attention(q, k, k, backend="cuda", causal=True)
    torch.testing.assert_close(o, reference.attention(q, k, k, causal=True), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", [8, 9])
def test_who_does_nothing_has_looked_at_the_first_work_before_another_one_takes_its_place(seed, monkeypatch):
    """Of many blocks of keys without a query a persistent block does one after another, at once."""
    monkeypatch.setattr(cuda, "emulator", functools.partial(emulator.run, seed=seed))
    q, k, v = (torch.randn(1, n, 2, width).bfloat16() for n, width in ((8, 192), (1700, 192), (1700, 128)))
    row = tuning_sm90_bwd.find(192, 128, "plain")
    assert row is not None
    with tuning_sm90_bwd.tried(row._replace(ways=frozenset(("ahead", "persistent")))):
        o = attention(q, k.requires_grad_(), v, backend="cuda", causal="upper_left")
        (dk,) = torch.autograd.grad(o.float().square().sum(), k)
    assert bool((dk[:, 8:] == 0).all()) and bool((dk[:, :8] != 0).any())
