"""The Hopper attention forward held to the law: on such a GPU where there is one, else in the emulator.

Queries make more than one block of 128 or 192 rows, keys several tiles with a ragged last one, so that rings of two stages wrap
and every kind of tile occurs. What the emulator cannot run late or early enough in one order of threads, other seeds do.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import hopper_calls
import law
import pytest
import torch
from attention_calls import DEVICE, NHEADS, Tensors
from hopper_calls import bias, given, noted, on_cuda, packed, qkv, reorder

import fastattn
from fastattn.ops.attention import reference, tuning_sm90
from fastattn.runtime import audit, cuda, jit

KERNEL = "attention_fwd_sm90_kernel"
SEQLEN_Q, SEQLEN_K = 140, 300


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noted(monkeypatch)


def holds(tensors: Tensors, launched: list[str], **options: Any) -> Tensors:
    return hopper_calls.holds(KERNEL, launched, tensors, options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("headdim, headdim_v", [(128, 128), (80, 72), (192, 128), (256, 256)])
def test_head_dimensions_hold_the_law(headdim, headdim_v, causal, launched):
    dtype = torch.float16 if causal else torch.bfloat16
    holds(qkv(SEQLEN_Q, SEQLEN_K, headdim=headdim, headdim_v=headdim_v, dtype=dtype), launched, causal=causal)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (1, 239), (64, 64), (65, 1), (203, 129), (257, 100)])
@pytest.mark.parametrize("causal", [False, True, "upper_left"])
def test_odd_lengths_hold_the_law(seqlen_q, seqlen_k, causal, launched):
    holds(qkv(seqlen_q, seqlen_k), launched, causal=causal)


def _blocks() -> torch.Tensor:
    """A tile of keys hidden from all, others from some, single pairs, and rows without any key."""
    mask = torch.rand(1, NHEADS, SEQLEN_Q, SEQLEN_K) < 0.5
    mask[..., 128:256] = False
    mask[:, 1, :, 96:] = False
    mask[:, :, 5:9] = False
    return mask


def _padding() -> torch.Tensor:
    return torch.arange(SEQLEN_K).expand(1, 1, 1, -1) < 77


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (90, 33)},
    "wide window": {"window": (150, 20), "causal": True},
    "sinks": {"sinks": torch.tensor([0.5, -math.inf]), "causal": "upper_left"},
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi_slopes": torch.tensor([[0.4, 0.01]]), "causal": True},
    "negative scale": {"scale": -0.2},
    "zero scale": {"scale": 0.0},
    "mask": {"mask": _blocks},
    "padding": {"mask": _padding, "causal": True},
    "mask per query": {"mask": lambda: torch.rand(SEQLEN_Q, 1) < 0.7},
    "bias": {"bias": lambda: bias(1, NHEADS, SEQLEN_Q, SEQLEN_K + 4).bfloat16()[..., :SEQLEN_K]},
    "bias of floats": {"bias": lambda: bias(SEQLEN_Q, SEQLEN_K), "causal": True},
    "bias at odd strides": {"bias": lambda: bias(NHEADS, SEQLEN_Q, SEQLEN_K).bfloat16()},
    "bias per key": {"bias": lambda: bias(1, 1, 1, SEQLEN_K), "window": (100, 100)},
    "bias and softcap": {
        "bias": lambda: bias(NHEADS, 1, SEQLEN_K + 4).bfloat16()[..., :SEQLEN_K], "softcap": 5.0, "scale": -0.1,
    },
    "dropout": {"dropout_p": 0.3, "causal": True},
    "everything": {
        "mask": _blocks, "bias": lambda: bias(SEQLEN_Q, SEQLEN_K), "alibi_slopes": torch.tensor([0.1, 0.3]), "softcap": 9.0,
        "sinks": torch.tensor([0.2, 1.0]), "window": (120, 60), "dropout_p": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_hold_the_law(name, launched):
    options = given(OPTIONS[name])
    tensors = {name: options.pop(name) for name in ("alibi_slopes", "bias", "sinks") if name in options}
    holds(qkv(SEQLEN_Q, SEQLEN_K) | tensors, launched, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 0)}], ids=str)
def test_packed_sequences_hold_the_law(options, launched):
    tensors = {name: t[0] for name, t in qkv(70 + 1 + 133, 110 + 5 + 140).items()}
    cu = {"cu_seqlens_q": packed(70, 0, 1, 133), "cu_seqlens_k": packed(110, 5, 0, 140)}
    holds(tensors, launched, **cu, **options)


def test_packed_sequences_of_wide_heads_walk_the_list_that_was_dealt(launched):
    tensors = {name: t[0] for name, t in qkv(70 + 1 + 20, 30 + 5 + 90, headdim=256).items()}
    holds(tensors, launched, cu_seqlens_q=packed(70, 0, 1, 20), cu_seqlens_k=packed(30, 5, 0, 90), causal=True)
    assert not any("kDynamic" in name for name in launched)


def row(ways: str, block_m: int = 128, block_n: int = 64, stages: int = 2, headdim: int = 64) -> tuning_sm90.Row:
    return tuning_sm90.Row(headdim, headdim, "dense", block_m, block_n, stages, frozenset(ways.split()), "under test")


@pytest.mark.parametrize(
    "bias, flags",
    [
        (torch.zeros(NHEADS, 33, 40).bfloat16(), "kBias | kTile"),
        (torch.zeros(33, 44)[:, :40], "kBias | kTile | kWide"),
        (torch.zeros(1, 1, 40).expand(NHEADS, 33, 40), "kBias | kTile | kRow | kWide"),
        (torch.zeros(NHEADS, 1, 40).bfloat16(), "kBias | kTile | kRow"),
        (torch.zeros(33, 41)[:, :40], "kGeneral | kBias"),
        (torch.zeros(33, 44)[:, 1:41], "kGeneral | kBias"),
        (torch.zeros(40, 33).t(), "kGeneral | kBias"),
        (torch.zeros(33, 1), "kGeneral | kBias"),
    ],
    ids=lambda x: x if isinstance(x, str) else str(tuple(x.shape)),
)
def test_a_bias_comes_by_tma_where_its_strides_allow(bias, flags):
    tensors = [torch.empty(1, seqlen, NHEADS, 64, dtype=torch.bfloat16) for seqlen in (33, 40, 40)]
    with cuda.recording(90) as recorded:
        fastattn.attention(*tensors, bias=bias, backend="cuda")
    assert recorded.launches[0].kernel.constants[-1] == flags
    assert "by TMA in tiles or rows" in str(tuning_sm90.find(64, 64, "bias"))


ROWS = (
    row(""),
    row("lazy pingpong"),
    row("overlap", stages=1),
    row("overlap lazy polynomial", block_n=128),
    row("overlap pingpong dynamic apart", stages=3),
    row("overlap lazy pingpong apart", block_m=192, block_n=80),
    row("overlap dynamic", block_m=64),
    row("overlap lazy multicast"),
)


@pytest.mark.parametrize("tried", ROWS, ids=str)
def test_every_way_holds_the_law_in_any_order_of_threads(tried, launched, monkeypatch):
    tensors, results = qkv(SEQLEN_Q, SEQLEN_K, batch=2, dtype=torch.float16), []
    for seed in (1, 2, 3):
        reorder(monkeypatch, seed)
        with tuning_sm90.tried(tried):
            results.append(holds(tensors, launched, causal=True))
    assert all(tried.flags in name for name in launched)
    assert all(torch.equal(found[name], results[0][name]) for found in results for name in found)


SHARED = {
    "odd number of blocks": (300, 333, {"causal": True}),
    "window": (300, 200, {"window": (60, 10)}),
    "mask": (
        300,
        333,
        {"causal": True, "mask": lambda: (torch.rand(NHEADS, 300, 333) < 0.5) & (torch.arange(333) % 160 < 60)},
    ),
    "packed": (
        *(70 + 1 + 133, 110 + 5 + 140),
        {"causal": True, "cu_seqlens_q": (70, 0, 1, 133), "cu_seqlens_k": (110, 5, 0, 140)},
    ),
}


@pytest.mark.parametrize("nheads_k", [1, 2], ids=["two heads", "queries of one head"])
@pytest.mark.parametrize("name", SHARED)
def test_clusters_hold_the_law(name, nheads_k, launched, monkeypatch):
    """The blocks of a cluster see different tiles, or nothing, and still both load half of each."""
    seqlen_q, seqlen_k, options = SHARED[name]
    tensors = qkv(seqlen_q, seqlen_k)
    for each in ("k", "v"):
        tensors[each] = tensors[each].expand(-1, -1, nheads_k, -1).contiguous()
    options = given(options)
    if name == "packed":
        tensors = {n: t[0] for n, t in tensors.items()}
        options |= {n: packed(*x) for n, x in options.items() if n.startswith("cu")}
    reorder(monkeypatch, seed=7)
    with tuning_sm90.tried(row("overlap lazy multicast")):
        holds(tensors, launched, **options)
    assert all("kMulticast" in name for name in launched)


def test_packed_sequences_and_counters_do_not_share_keys():
    shared = row("overlap lazy multicast")
    assert shared.fits() and not shared._replace(ways=shared.ways | {"dynamic"}).fits()
    tensors = [torch.empty(256, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    with cuda.recording(90) as recorded:
        fastattn.attention(*tensors, cu_seqlens_q=packed(100, 156), backend="cuda")
    assert recorded.launches[0].kernel.cluster == 1 and "kDynamic" in recorded.launches[0].kernel.constants[-2]


@pytest.mark.parametrize("hidden_by", ["mask", "causal", "length"])
def test_nan_in_hidden_keys_and_values_does_not_leak(hidden_by, launched):
    tensors, seen = qkv(SEQLEN_Q, 160), 100
    tensors["k"][:, seen:], tensors["v"][:, seen:] = math.nan, math.inf
    options: dict[str, Any] = {"sinks": torch.zeros(NHEADS, device=DEVICE)}
    if hidden_by == "mask":
        options["mask"] = (torch.arange(160) < seen).expand(1, 1, SEQLEN_Q, -1).to(DEVICE)
    elif hidden_by == "causal":
        options["causal"] = "upper_left"  # queries from `seen` on do see them
    else:
        tensors = {name: t[0] for name, t in tensors.items()}
        options["cu_seqlens_q"], options["cu_seqlens_k"] = packed(SEQLEN_Q, 0), packed(seen, 160 - seen)
    holds(tensors, launched, **options)


def test_layouts_that_tma_cannot_read_go_to_the_other_kernel(launched):
    for layout, hopper in (("transposed", True), ("sliced", False), ("expanded", False)):
        launched.clear()
        tensors = qkv(33, 40, batch=2, layout=layout)
        law.check(on_cuda, reference.attention, tensors, {"return_lse": True})
        assert (KERNEL in launched[0]) == hopper, (layout, launched)


@pytest.mark.parametrize("kind", tuning_sm90.KINDS)
def test_candidates_begin_with_the_row_in_use_and_fit(kind):
    for heads in tuning_sm90.HEADS:
        found = tuning_sm90.candidates(*heads, kind)
        used = tuning_sm90.find(*heads, kind)
        assert used.fits() and found[0][:-1] == used[:-1]
        assert len(set(found)) == len(found) > 10 and all(c.fits() and c.kind == kind for c in found)


@functools.cache
def compiled(tried: tuning_sm90.Row) -> tuple[list[str], str]:
    """Faults of the causal specialisation of a row, and its instructions."""
    tensors = [torch.empty(1, 256, 1, tried.headdim, dtype=torch.bfloat16) for _ in range(3)]
    with cuda.recording(90) as recorded, tuning_sm90.tried(tried):
        fastattn.attention(*tensors, causal=True, backend="cuda")
    kernel = recorded.launches[0].kernel
    built = jit.compile(kernel, "sm_90a")
    registers, stack, _, text = audit.dump(built.image, "-sass")
    faults = [built.log] if built.log else []
    faults += [f"{stack} bytes of stack"] if stack else []
    return faults + ([f"{registers} registers"] if registers * tried.threads * tried.blocks > 65536 else []), text


compiles = pytest.mark.skipif(jit.error() is not None, reason=str(jit.error()))
OVERLAPPED, PLAIN = row("overlap lazy", 128, 128, headdim=128), row("", 128, 64)


@compiles
@pytest.mark.parametrize("tried, products", [(OVERLAPPED, 4 * (8 + 8)), (PLAIN, 3 * (4 + 4))], ids=str)
def test_the_compiled_kernel_has_the_products_counted_by_hand(tried, products):
    """k-steps of 16 of both products, in the loops before, among and behind the whole tiles, and once more around them when
    the next scores overlap: without its values in front, without its scores behind."""
    pytest.importorskip("triton")  # its wheel has cuobjdump
    faults, text = compiled(tried)
    assert not faults and text.count("HGMMA.64x") == products


@compiles
def test_exponentials_and_sums_run_while_the_values_are_multiplied():
    """In each loop: products of the next scores, then of the values, and exponentials and sums before the wait for the latter."""
    pytest.importorskip("triton")
    _, text = compiled(OVERLAPPED)
    behind_scores = re.split(r"DEPBAR\.LE gsb0, 0x1", text)[1:]
    for opcode in ("MUFU.EX2", "FADD"):
        between = [part.split("DEPBAR.LE gsb0, 0x0")[0].count(opcode) for part in behind_scores]
        assert len(between) == 3 and min(between) >= 0.9 * 64
