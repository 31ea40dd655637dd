"""The Hopper attention backward held to the law: on such a GPU where there is one, else in the emulator.

The forward is the reference's, of floats: in 16 bits its scores are rounded, and the backward takes their lse for that of
unrounded ones. Blocks are 64 to 128 keys, tiles 64 or 128 queries: lengths are such that several blocks of keys add to a tile
of dq, rings of two stages wrap, and every kind of tile occurs.
"""

from __future__ import annotations

import math
from typing import Any

import hopper_calls
import law
import pytest
import torch
from attention_calls import DEVICE, NHEADS, Tensors
from hopper_calls import bias, given, noted, on_cuda, packed, qkv, reorder

from fastattn.ops.attention import _cuda, _cuda_bwd_sm90, _reference, reference, tuning_sm90_bwd
from fastattn.runtime import audit, jit

KERNEL = "attention_bwd_sm90_kernel"
SEQLEN_Q, SEQLEN_K = 150, 210
QKV = ("q", "k", "v")


@pytest.fixture(autouse=True)
def reference_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(spec: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> None:
        _reference.forward(spec, q.float(), k.float(), v.float(), *others)

    monkeypatch.setattr(_cuda, "forward", forward)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noted(monkeypatch)


def holds(
    tensors: Tensors,
    launched: list[str],
    wants: tuple[str, ...] = QKV,
    terms: float = 0.0,
    **options: Any,
) -> Tensors:
    return hopper_calls.holds(KERNEL, launched, tensors, options, wants, terms)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("headdim, headdim_v", [(64, 64), (128, 128), (80, 72), (192, 128), (176, 192), (256, 256)])
def test_head_dimensions_hold_the_law(headdim, headdim_v, causal, launched):
    dtype = torch.float16 if headdim == 80 else torch.bfloat16
    holds(qkv(SEQLEN_Q, SEQLEN_K, headdim=headdim, headdim_v=headdim_v, dtype=dtype), launched, causal=causal)


LENGTHS = [
    (1, 1, True),
    (1, 239, False),
    (64, 128, False),
    (65, 1, "upper_left"),
    (203, 129, True),
    (30, 400, "upper_left"),
]


@pytest.mark.parametrize("seqlen_q, seqlen_k, causal", LENGTHS)
def test_odd_lengths_hold_the_law(seqlen_q, seqlen_k, causal, launched):
    """Some keys see no query: their gradients are written, as zeros."""
    holds(qkv(seqlen_q, seqlen_k), launched, causal=causal)


def _blocks() -> torch.Tensor:
    """A block of keys hidden from all, others from some, single pairs, and rows without any key."""
    mask = torch.rand(1, NHEADS, SEQLEN_Q, SEQLEN_K) < 0.5
    mask[..., 128:] = False
    mask[:, 1, :, 96:] = False
    mask[:, :, 5:9] = False
    return mask


def _padding() -> torch.Tensor:
    """Whole blocks of keys are hidden, the first one among them."""
    n = torch.arange(SEQLEN_K)
    return ((n >= 130) & (n < 190)).expand(1, 1, 1, -1)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (40, 20)},
    "wide window": {"window": (150, 20), "causal": True},
    "negative scale": {"scale": -0.2},
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi_slopes": torch.tensor([[0.4, 0.01]]), "causal": True},
    "mask": {"mask": _blocks},
    "padding": {"mask": _padding},
    "padding with softcap": {"mask": _padding, "softcap": 5.0, "window": (100, None)},
    "bias": {"bias": lambda: bias(1, NHEADS, SEQLEN_Q, SEQLEN_K)},
    "dropout": {"dropout_p": 0.3, "causal": True},
    "everything": {
        "mask": _blocks, "bias": lambda: bias(SEQLEN_Q, SEQLEN_K), "alibi_slopes": lambda: torch.rand(NHEADS),
        "softcap": 9.0, "dropout_p": 0.2, "window": (120, 50),
    },
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_option_holds_the_law(option, launched):
    holds(qkv(SEQLEN_Q, SEQLEN_K), launched, **given(OPTIONS[option]))


def test_other_numbers_hold_the_law(launched):
    """Here the lse of rounded scores spoils dq and dk at one place each, whoever computes them from it."""
    holds(qkv(SEQLEN_Q, SEQLEN_K, seed=1), launched, scale=-0.2)


def test_sinks_have_a_gradient(launched):
    tensors = qkv(SEQLEN_Q, SEQLEN_K) | {"sinks": torch.tensor([0.5, -1.0]).to(DEVICE)}
    holds(tensors, launched, (*QKV, "sinks"), terms=1.0, causal="upper_left")


@pytest.mark.parametrize(
    "shape", [(1, NHEADS, 1, SEQLEN_K), (1, NHEADS, SEQLEN_Q, SEQLEN_K)], ids=["broadcast", "full"]
)
def test_a_bias_has_a_gradient(shape, launched):
    tensors = qkv(SEQLEN_Q, SEQLEN_K) | {"bias": law.randn(*shape, seed=4).to(DEVICE)}
    holds(tensors, launched, (*QKV, "bias"), terms=8.0, causal=True)


def test_a_full_bias_has_a_gradient_together_with_a_softcap(launched):
    """Scores far beyond the softcap: its derivative there is 0, that of the bias is not."""
    tensors = qkv(40, 150) | {"bias": law.randn(1, NHEADS, 40, 150, seed=4).to(DEVICE)}
    holds(tensors, launched, (*QKV, "bias"), terms=8.0, softcap=0.5, scale=20.0)


@pytest.mark.parametrize("headdim", [64, 256])
def test_packed_sequences_hold_the_law(headdim, launched):
    """Of odd lengths, without queries, without keys."""
    tensors = {name: t[0] for name, t in qkv(230, 300, headdim).items()}
    holds(tensors, launched, causal=True, cu_seqlens_q=packed(70, 0, 11, 149), cu_seqlens_k=packed(130, 10, 0, 160))


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_layouts_hold_the_law(layout, launched):
    """What TMA cannot read goes to the kernels for every GPU."""
    law.check(on_cuda, reference.attention, qkv(70, 130, batch=2, layout=layout), wants=QKV)
    assert any(name.startswith(KERNEL) for name in launched) == (layout != "expanded")


def test_groups_of_heads_and_sequences_hold_the_law(launched):
    holds(qkv(70, 140, batch=2, nheads=6, nheads_k=2), launched, causal=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("headdim", [64, 256])
def test_what_may_not_be_seen_may_hold_anything(headdim, bad, launched):
    """A poisoned sequence beside a clean one whose last tiles hold rows of both. What is computed again has other roundings."""
    tensors = {name: t[0] for name, t in qkv(140, 200, headdim).items()}
    options = {"causal": True, "cu_seqlens_q": packed(40, 100), "cu_seqlens_k": packed(40, 160)}
    clean = law.run(on_cuda, tensors, options, QKV, ("o",), 0)
    for t in tensors.values():
        t[40:] = bad
    found = law.run(on_cuda, tensors, options, QKV, ("o",), 0)
    assert torch.equal(found["dq"][:40], clean["dq"][:40])
    for name in ("dk", "dv"):
        torch.testing.assert_close(found[name][:40], clean[name][:40], rtol=1e-2, atol=2e-2)
    assert found["dq"][40:].isnan().all()


@pytest.mark.parametrize("what", QKV)
def test_poison_spoils_what_sees_it_and_no_more(what, launched):
    """One row of q or of k and v is NaN. Gradients are NaN where plain PyTorch's are."""
    tensors = qkv(150, 150, dtype=torch.bfloat16)
    tensors[what][0, 70, 0, 5] = math.nan
    holds(tensors, launched, causal=True)


def _row(headdim: int, headdim_v: int, *ways: str) -> tuning_sm90_bwd.Row:
    """Today's row for a band, gone about in these ways."""
    row = tuning_sm90_bwd.find(headdim, headdim_v, "plain")
    assert row is not None
    return row._replace(ways=frozenset(ways))


TURNS = [(64, 64, ("ahead",)), (128, 128, ("ahead", "apart", "persistent")), (192, 192, ())]


@pytest.mark.parametrize("headdim, headdim_v, ways", TURNS)
def test_equal_inputs_give_equal_bits_in_any_order_of_threads(headdim, headdim_v, ways, monkeypatch, launched):
    """Four blocks of keys take turns at each tile of dq."""
    tensors, found = qkv(200, 500, headdim, headdim_v, nheads=1), []
    for seed in range(3):
        reorder(monkeypatch, seed)
        with tuning_sm90_bwd.tried(_row(headdim, headdim_v, "ordered", *ways)):
            found.append(law.run(on_cuda, tensors, {"causal": True}, QKV, ("o",), 0))
    assert all(torch.equal(found[0][f"d{name}"], other[f"d{name}"]) for other in found[1:] for name in QKV)


PERSISTENT = [(128, 128, ("ahead", "ordered", "apart", "persistent")), (192, 128, ("ahead", "persistent"))]


@pytest.mark.parametrize("headdim, headdim_v, ways", PERSISTENT)
def test_a_block_that_does_work_after_work_holds_the_law(headdim, headdim_v, ways, launched):
    """Few blocks for many keys; some keys have no query, some works lie beyond the end of their sequence."""
    with tuning_sm90_bwd.tried(_row(headdim, headdim_v, *ways)):
        holds(qkv(70, 300, headdim, headdim_v, nheads=4, nheads_k=2), launched, causal="upper_left")
        tensors = {name: t[0] for name, t in qkv(230, 300, headdim, headdim_v).items()}
        holds(tensors, launched, causal=True, cu_seqlens_q=packed(70, 0, 11, 149), cu_seqlens_k=packed(130, 10, 0, 160))


def test_a_call_that_must_be_deterministic_takes_turns(launched):
    row = _row(64, 64, "ahead")
    with tuning_sm90_bwd.tried(row):
        assert tuning_sm90_bwd.row_of(_spec(64)).ways == row.ways
        assert tuning_sm90_bwd.row_of(_spec(64)._replace(deterministic=True)).ways == {"ahead", "ordered"}
    assert all("ordered" in row.ways for row in tuning_sm90_bwd.ROWS)


OTHER_WAYS = [(64, ("ordered",)), (64, ("ahead",)), (128, ("ordered",)), (128, ("ahead", "ordered", "apart"))]


@pytest.mark.parametrize("headdim, ways", OTHER_WAYS)
def test_other_ways_hold_the_law(headdim, ways, launched):
    """Without turns the sums of dq differ in rounding; the order of the products changes nothing."""
    tensors, first = qkv(200, 300, headdim), tuning_sm90_bwd.find(headdim, headdim, "plain")
    assert first is not None
    usual = holds(tensors, launched, causal=True)
    for row in [first._replace(ways=frozenset(ways))]:
        with tuning_sm90_bwd.tried(row):
            found = holds(tensors, launched, causal=True)
        same = QKV if "ordered" in ways else ("k", "v")
        assert all(torch.equal(found[f"d{name}"], usual[f"d{name}"]) for name in same)


@pytest.mark.parametrize("row", tuning_sm90_bwd.ROWS, ids=str)
def test_every_row_fits_a_multiprocessor(row):
    assert row.shared <= 227 << 10


@pytest.mark.parametrize("headdim", [128, 192])
def test_products_are_those_counted_by_hand(headdim):
    """Of each tile: s and dP over the head, dv and dk over the queries, dq over the keys; the first s and dP and the last of the
    others stand outside of the loop."""
    spec = _spec(headdim)
    row = tuning_sm90_bwd.row_of(spec)
    kernel = _cuda_bwd_sm90.kernel(spec, row)
    built = audit.audit(kernel, jit.target(kernel, 90))
    a_tile = (row.headdim + row.headdim_v) // 16 + 2 * row.BLOCK_M // 16 + row.BLOCK_N // 16
    products = sum(count for name, count in built.opcodes.items() if name.startswith("HGMMA"))
    assert products == 2 * a_tile
    assert built.faults(()) == []


def _spec(headdim: int) -> Any:
    from fastattn.ops.attention.spec import check_attention

    q, k, v = qkv(SEQLEN_Q, SEQLEN_K, headdim=headdim).values()
    return check_attention(q, k, v, *(None,) * 8, None, None, False, None, None, 0.0)
