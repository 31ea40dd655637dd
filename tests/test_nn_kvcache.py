"""KVCache: the dynamic, static and paged shapes give what attention over all past keys gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn
from fastattn.nn import KVCache, RotaryEmbedding

LAYERS, BATCH, HEADS, HEADS_K, HEADDIM = 2, 3, 4, 2, 16
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"capacity": 200},
    "paged": {"block_size": 8, "num_blocks": 80},
}


def cache(kind: str, **options: Any) -> KVCache:
    return KVCache(LAYERS, BATCH, HEADS_K, HEADDIM, **KINDS[kind], **options)


def step(seqlen: int) -> list[torch.Tensor]:
    return [torch.randn(BATCH, seqlen, heads, HEADDIM) for heads in (HEADS, HEADS_K, HEADS_K)]


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_prefill_and_decoding(kind: str, rotate: bool) -> None:
    """A padded prompt of three lengths, then single and double tokens: each sequence as if it were alone."""
    memory = cache(kind)
    rotary = RotaryEmbedding(HEADDIM, max_seqlen=256)
    cos, sin = rotary.tables(256)
    tables = {"cos": cos, "sin": sin} if rotate else {}
    past: list[list[list[torch.Tensor]]] = [[[] for _ in range(BATCH)] for _ in range(LAYERS)]
    counts = [[70, 5, 33], [1] * 3, [1] * 3, [2] * 3, [40] * 3, [1] * 3]
    for count in counts:
        for layer in range(LAYERS):
            q, k, v = step(max(count))
            got = memory.attend(layer, q, k, v, **tables)
            for b in range(BATCH):
                n = count[b]
                past[layer][b].append(torch.stack((k[b, :n], v[b, :n])))
                keys, values = torch.cat(past[layer][b], dim=1)[:, None]
                first = keys.shape[1] - n
                query = q[b, None, :n]
                if rotate:
                    ids = torch.arange(keys.shape[1])
                    query = fastattn.rope(query, cos, sin, position_ids=ids[None, first:])
                    keys = fastattn.rope(keys, cos, sin, position_ids=ids[None])
                expected = fastattn.reference.attention(query, keys, values, causal=True)
                torch.testing.assert_close(got[b, None, :n], expected, rtol=1e-4, atol=1e-5)
        memory.advance(count)
    assert memory.lengths == memory.seqlens.tolist() == [sum(c[b] for c in counts) for b in range(BATCH)]
    assert memory.capacity >= 40


def test_a_dynamic_cache_grows_seldom() -> None:
    memory = cache("dynamic")
    addresses = set()
    for _ in range(200):
        memory.attend(0, *step(1))
        memory.advance(1)
        addresses.add(memory.k[0].shape[1])
    assert addresses == {64, 128, 256} and memory.capacity == 256


def test_a_static_cache_keeps_its_memory_and_refuses_when_full() -> None:
    memory = KVCache(1, BATCH, HEADS_K, HEADDIM, capacity=10)
    before = memory.k[0].data_ptr()
    memory.attend(0, *step(9))
    memory.advance(9)
    memory.attend(0, *step(1))
    memory.advance(1)
    assert memory.k[0].data_ptr() == before
    with pytest.raises(
        ValueError, match="capacity must be at least 11: 10 keys are present and 1 are appended, got 10"
    ):
        memory.attend(0, *step(1))


def test_paged_sequences_take_blocks_as_they_need_them_and_give_them_back() -> None:
    memory = KVCache(1, BATCH, HEADS_K, HEADDIM, block_size=4, num_blocks=9)
    memory.attend(0, *step(5))
    memory.advance([5, 1, 4])
    assert memory.block_table is not None
    assert sorted(memory.block_table.flatten().tolist()) == sorted(set(memory.block_table.flatten().tolist()))
    memory.attend(0, *step(4))
    memory.advance(4)
    assert memory.lengths == [9, 5, 8] and "paged" in repr(memory)
    with pytest.raises(ValueError, match="num_blocks must be at least 13 for these sequences, got 9"):
        memory.reserve(8)
    memory.reset([0])
    assert memory.lengths == [0, 5, 8]
    memory.reserve(7)
    memory.reset()
    assert memory.lengths == [0] * BATCH and memory.seqlens.tolist() == [0] * BATCH
    assert sorted(memory._free) == list(range(9))


def test_a_reset_sequence_starts_anew() -> None:
    for kind in KINDS:
        memory, fresh = cache(kind), cache(kind)
        memory.attend(0, *step(20))
        memory.advance(20)
        memory.reset([1])
        new = step(3)
        got, expected = memory.attend(0, *new), fresh.attend(0, *new)
        assert torch.equal(got[1], expected[1]) and not torch.equal(got[0], expected[0])


def test_options_go_to_the_kernel() -> None:
    memory = cache("dynamic", headdim_v=8)
    q, k, v = step(6)
    o, lse = memory.attend(0, q, k, v[..., :8].contiguous(), window=(2, None), softcap=5.0, return_lse=True)
    expected = fastattn.attention(q, k, v[..., :8].contiguous(), causal=True, window=(2, None), softcap=5.0)
    torch.testing.assert_close(o, expected)
    assert lse.shape == (BATCH, HEADS, 6)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="block_size and num_blocks must be given together, got 4 and None"):
        KVCache(1, 1, 1, 8, block_size=4)
    with pytest.raises(ValueError, match="capacity must be None for a paged cache"):
        KVCache(1, 1, 1, 8, block_size=4, num_blocks=2, capacity=8)
    with pytest.raises(ValueError, match=r"count must be a number >= 0, or one per sequence \(3\), got \[1, 2\]"):
        cache("dynamic").advance([1, 2])
    for count, words in (
        (1.5, "count must be a number"),
        (65, "count must be at most the 64 keys that sequence 0 has"),
    ):
        with pytest.raises(ValueError, match=words):
            cache("dynamic").advance(count)
    with pytest.raises(ValueError, match="sequences must be numbers of the 3 sequences"):
        cache("dynamic").reset([3])
    q, k = torch.randn(BATCH, 1, HEADS, 16), torch.randn(BATCH, 1, 2, 16)
    with pytest.raises(ValueError, match="layer must be one of"):
        cache("dynamic").attend(99, q, k, k)
    for wrong in ({"capacity": -3}, {"block_size": 0, "num_blocks": 2}, {"headdim_v": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
            KVCache(1, 1, 1, 8, **wrong)
    with pytest.raises(ValueError, match="dtype must be floating"):
        KVCache(1, 1, 1, 8, dtype=torch.int8)
