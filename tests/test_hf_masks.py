"""Masks stay compact and mean exactly what transformers' own sdpa_mask builds, for every mask function it makes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers
from transformers import masking_utils as hf

import fastattn
from fastattn.hf import masks
from fastattn.hf.attention import fastattn_attention
from fastattn.hf.compact import CompactMask, Pattern, pack, segments_of
from fastattn.hf.masks import describe, fastattn_mask

Tensor = torch.Tensor
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
SEGMENTS = segments_of(POSITIONS)


def _packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers puts it together, since 5.16 by positions, before by indices."""
    make = getattr(hf, "packed_sequence_compatibility_function", None)
    if make is not None:
        return make(function, POSITIONS, SEGMENTS)
    return hf.and_masks(function, hf.packed_sequence_mask_function(SEGMENTS))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal": hf.causal_mask_function,
    "full": hf.bidirectional_mask_function,
    "window 1": hf.sliding_window_causal_mask_function(1),
    "window 4": hf.sliding_window_causal_mask_function(4),
    "packed": _packed(hf.causal_mask_function),
    "packed window": _packed(hf.sliding_window_causal_mask_function(2)),
    "chunked": hf.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "prefix": hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: k < 3),
    "unknown": lambda b, h, q, k: (q + k) % 3 != 1,
}
if hasattr(hf, "sliding_window_bidirectional_mask_function"):
    FUNCTIONS["two-sided window"] = hf.sliding_window_bidirectional_mask_function(3)
if hasattr(hf, "blockwise_overlay"):
    groups = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1]] * 2)
    FUNCTIONS["blocks"] = hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(groups))
DENSE = ("chunked", "prefix", "blocks", "unknown")


def _dense(mask: Tensor | None, causal: bool, seqlen_q: int, seqlen_k: int) -> Tensor:
    """What a mask means, None included."""
    if mask is not None:
        return torch.logical_and(mask, torch.ones((), dtype=torch.bool)).expand(2, 1, seqlen_q, seqlen_k)
    full = torch.ones(2, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    return full.tril() if causal and seqlen_q > 1 else full


def _call(function: Callable[..., Any], sizes: dict[str, Any], **more: Any) -> Tensor | None:
    if "q_length" not in inspect.signature(hf.sdpa_mask).parameters:
        q, offset = sizes["q_length"], sizes["q_offset"]
        sizes = {k: v for k, v in sizes.items() if k[0] != "q"} | {"cache_position": torch.arange(q) + offset}
    return function(batch_size=2, **sizes, **more)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([name for name in FUNCTIONS if not name.startswith(("packed", "blocks"))]),
    st.integers(1, 9),
    st.integers(0, 6),
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from(["none", "all", "left", "right", "short"]),
    st.booleans(),
)
def test_same_pairs_as_sdpa_mask(name: str, q: int, before: int, ahead: int, dropped: int, padding: str, skip: bool):
    """before: cached tokens; ahead: empty slots of a static cache; dropped: tokens a sliding cache has forgotten."""
    dropped = min(dropped, before)
    sizes = {"q_length": q, "q_offset": before, "kv_offset": dropped, "kv_length": before + q + ahead - dropped}
    row = (
        None
        if padding == "none"
        else torch.ones(2, before + q + (0 if padding == "short" else ahead), dtype=torch.bool)
    )
    if padding == "left":
        row[0, : min(2, before + q - 1)] = False  # type: ignore[index]
    if padding == "right":
        row[1, -2:] = False  # type: ignore[index]
    causal = name not in ("full", "two-sided window")
    skip = skip and name not in DENSE  # transformers does not allow to skip masks that are more than a band
    skips = {"allow_is_causal_skip": skip and causal, "allow_is_bidirectional_skip": skip and not causal}
    ours = _call(fastattn_mask, sizes, mask_function=FUNCTIONS[name], attention_mask=row, **skips)
    theirs = _call(
        hf.sdpa_mask,
        sizes,
        mask_function=FUNCTIONS[name],
        attention_mask=row,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
    )
    assert theirs is not None
    pair = (q, sizes["kv_length"])
    assert torch.equal(_dense(ours, causal, *pair), _dense(theirs, causal, *pair))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_functions_stay_compact_and_others_are_dense(name: str):
    sizes = {"q_length": 9, "q_offset": 0, "kv_offset": 0, "kv_length": 9}
    row = None if name.startswith("packed") else torch.arange(9)[None] < torch.tensor([[9], [6]])
    mask = _call(fastattn_mask, sizes, mask_function=FUNCTIONS[name], attention_mask=row)
    theirs = _call(hf.sdpa_mask, sizes, mask_function=FUNCTIONS[name], attention_mask=row, allow_is_causal_skip=False)
    assert isinstance(mask, CompactMask) == (name not in DENSE)
    assert torch.equal(_dense(mask, True, 9, 9), _dense(theirs, True, 9, 9))
    assert (describe(FUNCTIONS[name]) is None) == (name in DENSE)


def test_nothing_is_stored_for_plain_causality():
    ones = torch.ones(2, 9, dtype=torch.bool)
    for q, offset in ((9, 0), (1, 8)):
        sizes = {"q_length": q, "q_offset": offset, "kv_offset": 0, "kv_length": 9}
        mask = _call(fastattn_mask, sizes, mask_function=hf.causal_mask_function, attention_mask=ones)
        assert mask is None if q == 1 else isinstance(mask, CompactMask)
        assert mask is None or (mask.padding is None and mask.pattern == Pattern(right=0))


@pytest.mark.parametrize(("model", "trusted"), [("Llama", True), ("Gemma2", True), ("NllbMoe", False)])
def test_a_traced_mask_is_left_out_only_where_the_modules_word_is_known(monkeypatch, model: str, trusted: bool):
    """None means what the attention module says of itself; models for eager attention alone are never asked for it."""
    getattr(transformers, f"{model}PreTrainedModel")
    config = getattr(transformers, f"{model}Config")()
    monkeypatch.setattr(masks, "_tracing", lambda *_: True)
    sizes = {"q_length": 9, "q_offset": 0, "kv_offset": 0, "kv_length": 9}
    mask = _call(fastattn_mask, sizes, mask_function=hf.causal_mask_function, config=config, allow_is_causal_skip=True)
    assert mask is None if trusted else torch.equal(mask[0, 0], torch.ones(9, 9, dtype=torch.bool).tril())


def test_positions_that_do_not_count_up_are_no_band():
    positions = torch.tensor([[0, 2, 4, 0, 3, 6, 9, 12, 15]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    if not hasattr(hf, "packed_sequence_compatibility_function"):
        pytest.skip("this transformers compares indices, not positions")
    function = hf.packed_sequence_compatibility_function(hf.sliding_window_causal_mask_function(3), positions, segments)
    assert describe(function) is None


def _mask(**more: Any) -> CompactMask:
    padding = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    return CompactMask(2, 4, 6, Pattern(left=2, right=0), 2, more.get("padding", padding), "cpu")


def test_a_model_that_edits_its_mask_gets_plain_tensors():
    mask = _mask()
    dense = mask.dense()
    assert type(dense) is Tensor and mask.shape == dense.shape and mask.dtype == torch.bool
    minus = torch.finfo(torch.float32).min
    for edit in (
        lambda m: m[:, :, :, :5],
        lambda m: ~m,
        lambda m: m.to(torch.float32),
        lambda m: m & dense,
        lambda m: torch.where(m, 0.0, minus),
        lambda m: torch.cat([m, m], -1),
        lambda m: m.clone(),
        lambda m: m.expand(2, 3, 4, 6),
    ):
        edited = edit(mask)
        assert type(edited) is Tensor and torch.equal(edited, edit(dense))
    assert bool(mask.any()) and "left=2" in repr(mask)


def test_copies_and_moves_stay_compact():
    mask = _mask()
    for same in (copy.deepcopy(mask), mask.detach(), mask.to("cpu"), mask.to(torch.bool), mask.to("cpu", copy=True)):
        assert isinstance(same, CompactMask) and torch.equal(same.dense(), mask.dense())
    moved = mask.to("meta", non_blocking=True)
    assert isinstance(moved, CompactMask) and moved.device == moved.padding.device == torch.device("meta")


def test_pack_starts_a_sequence_at_every_row_of_the_batch():
    packed = pack(SEGMENTS)
    assert packed.cu_seqlens.tolist() == [0, 3, 8, 9, 18] and packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 9


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(-1, 7),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.booleans(),
)
def test_attention_reads_a_compact_mask_like_its_matrix(
    q: int, k: int, shift: int, left: int | None, right: int | None, padded: bool, packed: bool
):
    g = torch.Generator().manual_seed(q + 10 * k)
    query = torch.randn(2, 4, q, 8, generator=g)
    key, value = torch.randn(2, 2, k, 8, generator=g), torch.randn(2, 2, k, 6, generator=g)
    padding = torch.rand(2, k, generator=g) < 0.7 if padded else None
    segments = torch.randint(0, 2, (2, q), generator=g).cumsum(-1) if packed and q == k else None
    mask = CompactMask(2, q, k, Pattern(left, right, segments), shift, padding, "cpu")
    module = torch.nn.Module()
    ours, _ = fastattn_attention(module, query, key, value, mask)
    plain = fastattn.reference.attention(*(x.transpose(1, 2) for x in (query, key, value)), mask=mask.dense())
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
