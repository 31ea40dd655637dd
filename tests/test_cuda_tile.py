"""The verbs of csrc/cuda/tile that attention is made of, each alone in the emulator."""

from __future__ import annotations

import functools
import math

import emulator
import pytest
import torch
from emulator import trial as trials

from fastattn.ops.attention import _philox

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++")
trial = functools.partial(trials.trial, file="tile.cuh")
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
WIDTHS = (32, 64, 96, 192)


@pytest.mark.parametrize("cols", WIDTHS)
def test_a_tile_has_a_place_for_everything_and_no_bank_conflicts(cols: int) -> None:
    """Eight rows of an ldmatrix, and eight neighbouring lanes of a copy, touch all 32 banks: 16 bytes each."""
    out = torch.zeros(16, cols // 8, 2, dtype=torch.int32)
    trial("layout_kernel", out, constants=("16", str(cols)))
    at = out[..., 0]
    assert torch.equal(at, out[..., 1])
    assert torch.equal(at.flatten().sort().values, torch.arange(0, 32 * cols, 16, dtype=torch.int32))
    for rows in (at[:8], at[8:]):
        for column in rows.T:
            assert sorted(column.div(16).remainder(8).tolist()) == list(range(8))
    across = 8 if cols % 64 == 0 else 4
    copied = at.view(16, -1, across).transpose(0, 1).reshape(-1, 8)  # what eight lanes of a copy write
    assert all(sorted(lanes.div(16).remainder(8).tolist()) == list(range(8)) for lanes in copied)


@pytest.mark.parametrize("aligned", ["true", "false"])
@pytest.mark.parametrize("cols", WIDTHS)
def test_rows_are_copied_and_the_rest_is_zero(cols: int, aligned: str) -> None:
    for rows, columns in ((32, cols), (17, cols - 8), (0, 8)):
        a = torch.randn(32, 2 * cols).bfloat16()
        out = torch.full((32, cols), math.nan, dtype=torch.bfloat16)
        trial(
            "copy_kernel",
            out,
            a,
            constants=("32", str(cols), aligned),
            threads=64,
            shared=64 * cols,
            n=rows,
            fault=columns,
        )
        expected = torch.zeros(32, cols, dtype=torch.bfloat16)
        expected[:rows, :columns] = a[:rows, :columns]
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cols", [32, 64])
def test_two_products_share_their_fragments(cols: int, kind: str) -> None:
    a, b = (torch.randn(rows, cols).mul(0.3).to(TYPES[kind]) for rows in (16, 32))
    out = torch.zeros(16, cols)
    trial("products_kernel", out, a, b, constants=(kind, str(cols)), threads=64, shared=2048 + 64 * cols)
    weights = (a.float() @ b.float().T).to(TYPES[kind]).double()
    torch.testing.assert_close(out.double(), weights @ b.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("diagonal", [0, 23, -23])
@pytest.mark.parametrize("left,right", [(200, 0), (200, 200), (7, 5), (40, 0), (0, 90)])
def test_ranges_hold_what_is_seen(left: int, right: int, diagonal: int) -> None:
    seqlen_q, seqlen_k = 70, 93
    blocks = 5
    out = torch.zeros(blocks, 9, dtype=torch.int32)
    trial("band_kernel", out, torch.tensor([left, right, seqlen_q, seqlen_k, diagonal], dtype=torch.int32), n=blocks)
    m, n = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None, :]
    seen = (n >= m + diagonal - left) & (n <= m + diagonal + right)
    for i, found in enumerate(out.tolist()):
        rows, columns = seen[16 * i : 16 * i + 16], seen[:, 16 * i : 16 * i + 16].T
        for block, (lo, hi, whole_lo, whole_hi) in ((rows, found[:4]), (columns, found[4:8])):
            some, every = block.any(0).nonzero().flatten().tolist(), block.all(0).nonzero().flatten().tolist()
            assert lo % 16 == 0 and (not some or (lo <= some[0] < lo + 16 and hi == some[-1] + 1))
            assert every == list(range(whole_lo, whole_hi))
        whole = bool(((n[:, :16] >= torch.arange(16)[:, None] + 16 * i + diagonal - left)
                      & (n[:, :16] <= torch.arange(16)[:, None] + 16 * i + diagonal + right)).all())  # fmt: skip
        assert bool(found[8]) == whole


@pytest.mark.parametrize("lazy", ["true", "false"])
def test_online_softmax_finds_lse(lazy: str) -> None:
    """Rising and falling rows, huge ones, rows that begin or consist of nothing; weights and total agree."""
    scores = torch.randn(16, 64) * 4
    scores[0] = torch.arange(64.0)
    scores[1] = -torch.arange(64.0)
    scores[2] *= 1e4
    scores[3, :40] = -math.inf
    scores[4] = -math.inf
    out = torch.zeros(16, 2)
    trial("softmax_kernel", out, scores, constants=(lazy,), n=4, fault=3)
    expected = torch.logsumexp(scores.double() * 3 * math.log(2), dim=1).float()
    for found in out.T:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_philox_fragments_hold_the_words_of_the_definition() -> None:
    philox = torch.tensor([0x123456789ABCDEF0, 0x0FEDCBA987654321])
    out = torch.zeros(2, 16, 8, dtype=torch.int32)
    trial("philox_kernel", out, philox, n=77)

    def words(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        low = 0xFFFFFFFF
        counter = (keys >> 2, queries, torch.tensor(77), philox[1] & low)
        four = torch.stack(
            torch.broadcast_tensors(*_philox.philox4x32_10(counter, (philox[0] & low, philox[0] >> 32))), -1
        )
        return four.gather(-1, (keys & 3).expand(four.shape[:-1])[..., None])[..., 0]

    found = out.long() & 0xFFFFFFFF
    assert torch.equal(found[0], words(torch.arange(24, 40)[:, None], torch.arange(32, 40)[None, :]))
    assert torch.equal(found[1], words(torch.arange(24, 32)[None, :], torch.arange(40, 56)[:, None]))


@pytest.mark.parametrize("softcap", [0.0, 0.7, 50.0])
def test_scores_come_in_the_order_of_the_contract(softcap: float) -> None:
    s = torch.cat([torch.randn(50) * 30, torch.tensor([0.0, 1e-6, 1e4, -1e4])])
    scale, slope, distance = 0.3, 0.5, -7.0
    out = torch.zeros(len(s))
    trial("score_kernel", out, s, torch.tensor([scale, softcap, slope, distance]), n=len(s))
    expected = s.double() * scale
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
    expected = (expected - slope * abs(distance)) / math.log(2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=2e-6 * max(1.0, softcap))


@pytest.mark.parametrize("cols", [70, 72, 17000])
@pytest.mark.parametrize("shared_row", [False, True])
def test_a_walk_visits_what_the_mask_shows(cols: int, shared_row: bool) -> None:
    """More tiles than are looked at in advance; lengths that are and are not read four bytes at a time."""
    tiles = -(-cols // 16)
    kinds = torch.randint(0, 3, (tiles,))
    mask = torch.zeros(20, 16 * tiles, dtype=torch.bool)
    for i, kind in enumerate(kinds.tolist()):
        mask[:, 16 * i : 16 * i + 16] = kind == 2
        if kind == 1:
            mask[0 if shared_row else 9, min(16 * i + i % 16, cols - 1)] = True
    mask = mask[:, :cols].contiguous()
    out = torch.zeros(tiles, dtype=torch.int32)
    trial("walk_kernel", out, mask.to(torch.uint8), threads=64, n=cols, fault=int(shared_row))
    assert torch.equal(out.long(), kinds)
