"""The Triton kernels of attention, held to the law: on the GPU where there is one, else in Triton's interpreter.

The interpreter's tiles are 16 and 32 wide (tuning.py), so lengths around 40 make whole, masked and skipped tiles. What
holds for every backend is in test_attention.py; here are the tiles' edges and the options in each other's company.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import law
import pytest
import torch
from attention_calls import DEVICE, NHEADS, Calls, persistent

import fastattn
from fastattn.ops.attention import _philox, attention, attention_weights, reference, tuning
from fastattn.runtime import launch

pytest.importorskip("triton")

DTYPES = law.LOW
QKV = ("q", "k", "v")
SEQLEN_Q, SEQLEN_K = 34, 45
CALLS = Calls(SEQLEN_Q, SEQLEN_K, headdim=16, dtype=torch.float32, tile=16, window=(11, 6))
qkv, OPTIONS, with_options = CALLS.qkv, CALLS.options, CALLS.with_options


def triton(*args: Any, **kwargs: Any) -> Any:
    return attention(*args, backend="triton", **kwargs)


def holds(tensors: dict[str, torch.Tensor], options: dict[str, Any], wants: tuple[str, ...] = QKV) -> Any:
    return law.check(triton, reference.attention, tensors, {"return_lse": True, **options}, wants=wants)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["scale", "softcap", "mask", "bias", "shared_bias", "alibi", "sinks", "dropout"])
def test_option(option: str, dtype: torch.dtype) -> None:
    holds(*with_options(option, dtype=dtype))


_SAME = ({"causal", "window"}, {"bias", "shared_bias"})
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if set(pair) not in _SAME]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair_of_options(pair: tuple[str, str]) -> None:
    holds(*with_options(*pair, headdim=8, nheads_k=NHEADS))


BANDS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": "upper_left"},
    {"window": (1, 2)},
    {"window": (20, None)},
    {"window": (None, 3), "causal": "upper_left"},
]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 1), (1, 70), (64, 64), (33, 97), (65, 17)])
def test_band(seqlen_q: int, seqlen_k: int, band: dict[str, Any]) -> None:
    """Queries before the first key, keys after the last query, and tiles exactly on the edges."""
    holds(qkv(seqlen_q, seqlen_k, 8, nheads_k=NHEADS, nheads=NHEADS), band)


HEADS = [
    (1, 1),
    (8, 8),
    (40, 24),
    (59, 59),
    (64, 64),
    (80, 80),
    (96, 128),
    (128, 64),
    (192, 128),
    (256, 256),
    (576, 512),
]


@pytest.mark.parametrize("headdim,headdim_v", HEADS)
def test_headdim(headdim: int, headdim_v: int) -> None:
    holds(qkv(17, 35, headdim, headdim_v, nheads=1, nheads_k=1), {"causal": True})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("headdim,headdim_v", [(59, 80), (80, 59)])
def test_split_headdim(headdim: int, headdim_v: int, dtype: torch.dtype) -> None:
    holds(qkv(17, 35, headdim, headdim_v, nheads=1, nheads_k=1, dtype=dtype), {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nheads,nheads_k", [(3, 3), (4, 2), (3, 1)])
def test_grouped_heads(nheads: int, nheads_k: int, dtype: torch.dtype) -> None:
    holds(qkv(33, 18, nheads=nheads, nheads_k=nheads_k, dtype=dtype), {"causal": True})


@pytest.mark.parametrize("layout", law.LAYOUTS)
def test_layout(layout: str) -> None:
    holds(qkv(layout=layout, batch=2, dtype=torch.bfloat16), {})


@pytest.mark.parametrize("shape", [(45,), (34, 1), (2, 1, 45), (2, 1, 1, 45), (2, 1, 34, 45), (1, 2, 34, 1), (1,) * 4])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_broadcast_pairs(kind: str, shape: tuple[int, ...]) -> None:
    """A side that broadcasts is read through stride 0, and its gradient is the sum over it."""
    tensors = qkv(batch=2, headdim=8)
    if kind == "mask":
        holds(tensors, {"mask": (torch.rand(shape) < 0.6).to(DEVICE)})
    else:
        holds({**tensors, "bias": law.randn(*shape, seed=4).to(DEVICE)}, {}, (*QKV, "bias"))


def test_strided_pairs() -> None:
    mask = (torch.rand(1, 1, SEQLEN_K, SEQLEN_Q) < 0.7).to(DEVICE).transpose(-1, -2).expand(1, NHEADS, -1, -1)
    bias = law.randn(1, 1, SEQLEN_K, SEQLEN_Q, seed=4).to(DEVICE).transpose(-1, -2).expand(1, NHEADS, -1, -1)
    holds({**qkv(), "bias": bias}, {"mask": mask}, (*QKV, "bias"))


@pytest.mark.parametrize("nheads_k", [1, 2])
def test_tiles_that_a_mask_hides(nheads_k: int) -> None:
    """Padding on either side, a causal mask as booleans, and a head that sees nothing."""
    padding = torch.ones(2, 1, 1, 100, dtype=torch.bool)
    padding[0, ..., 40:], padding[1, ..., :70] = False, False
    triangle = torch.ones(2, NHEADS, 40, 100, dtype=torch.bool).tril(30)
    triangle[1, 1] = False
    for mask in (padding, triangle):
        holds(qkv(40, 100, 8, batch=2, nheads_k=nheads_k), {"mask": mask.to(DEVICE)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bias_and_sinks(dtype: torch.dtype) -> None:
    tensors, options, wants = with_options("bias", "sinks", dtype=dtype)
    tensors["bias"], tensors["sinks"] = tensors["bias"].to(dtype), tensors["sinks"].to(dtype)
    holds(tensors, options, wants)


CU_SEQLENS_Q = torch.tensor([0, 0, 33, 34, 75], dtype=torch.int32, device=DEVICE)
CU_SEQLENS_K = torch.tensor([0, 9, 42, 42, 92], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("option", ["causal", "window", "dropout", "sinks", "bias", "shared_bias", "mask", "alibi"])
def test_packed(option: str) -> None:
    """Ragged batches with a sequence that has no queries and one that has no keys."""
    shapes = {"q": (75, NHEADS, 16), "k": (92, 1, 16), "v": (92, 1, 8)}
    tensors = {n: law.randn(*shape, seed=i).to(DEVICE) for i, (n, shape) in enumerate(shapes.items())}
    keywords: dict[str, Any] = {"cu_seqlens_q": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K}
    wants = QKV
    if option in ("bias", "shared_bias"):
        shape = (4, NHEADS, 41, 50) if option == "bias" else (NHEADS, 41, 50)
        tensors["bias"] = law.randn(*shape, seed=4).to(DEVICE)
        wants = (*QKV, "bias")
    elif option == "mask":
        keywords["mask"] = (torch.rand(4, 1, 41, 50) < 0.7).to(DEVICE)
    elif option == "alibi":
        tensors["alibi_slopes"] = torch.rand(4, NHEADS).to(DEVICE)
    elif option == "sinks":
        tensors["sinks"] = law.randn(NHEADS, seed=5).to(DEVICE)
        wants = (*QKV, "sinks")
    else:
        keywords.update(OPTIONS[option][1])
    holds(tensors, keywords, wants)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["batch", "seqlen_q", "seqlen_k"])
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    tensors = {name: t.requires_grad_() for name, t in qkv(seqlen_q, seqlen_k, batch=batch).items()}
    o, lse = triton(**tensors, return_lse=True)
    assert (o == 0).all() and (lse == -math.inf).all()
    for g in torch.autograd.grad(o.sum(), list(tensors.values())):
        assert (g == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
def test_dropout_drops_what_the_definition_says(p: float) -> None:
    """With v the identity, o is the matrix of probabilities: its zeros are the dropped pairs, in forward and backward."""
    torch.manual_seed(5)
    q, k = (t.requires_grad_() for t in (law.randn(1, 35, 2, 8), law.randn(1, 48, 2, 8)))
    v = torch.eye(48)[None, :, None].expand(1, 48, 2, 48)
    q, k, v = (t.detach().to(DEVICE) for t in (q, k, v))
    v.requires_grad_()
    torch.manual_seed(7)
    philox = _philox.draw(q.device)
    torch.manual_seed(7)
    o = triton(q, k, v, dropout_p=p)
    keep = _philox.keep_mask(philox, p, 0, 1, 2, 35, 48)
    assert torch.equal(o.detach().permute(0, 2, 1, 3) != 0, keep)
    (dv,) = torch.autograd.grad(o, v, torch.ones_like(o))
    kept = (o.detach().permute(0, 2, 1, 3)).sum(2)
    torch.testing.assert_close(dv.sum(-1) / 48, kept.transpose(1, 2), rtol=1e-5, atol=1e-5)


_POISONS = [(bad, (), dtype) for bad in (math.nan, math.inf) for dtype in DTYPES]
_POISONS += [(math.nan, (272, 256), torch.float32)]  # several slices in the slow road, and two walks over the queries


@pytest.mark.parametrize("bad, heads, dtype", _POISONS, ids=str)
@pytest.mark.parametrize("what", ["keys", "queries"])
def test_what_may_not_be_seen_may_hold_anything(
    what: str, bad: float, heads: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A band, a mask and a bias hide the poison; the tiles it lies in hold visible pairs too."""
    mask = torch.ones(1, 1, SEQLEN_Q, SEQLEN_K, dtype=torch.bool)
    mask[..., 20:22], mask[:, :, 11:13] = False, False
    bias = torch.zeros(1, 1, SEQLEN_Q, SEQLEN_K).masked_fill(torch.arange(SEQLEN_K) == 40, -math.inf)

    def poisoned(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        q, k, v = q.clone(), k.clone(), v.clone()
        if what == "keys":
            k[:, 20], v[:, 21], k[:, 40], v[:, 40] = bad, bad, bad, bad
        else:
            q[:, 11:13] = bad
        return triton(q, k, v, **kwargs)

    options = {"mask": mask.to(DEVICE), "bias": bias.to(DEVICE), "causal": True, "return_lse": True}
    law.check(poisoned, reference.attention, qkv(None, None, *heads, dtype=dtype), options, wants=QKV)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_poison_spoils_what_sees_it(bad: float) -> None:
    """One value in one column: the rows before it are as without it, the rows that see it hold what plain PyTorch has."""
    tensors = qkv(48, 48, 80)
    clean = triton(**tensors, causal=True)
    tensors["v"][0, 31, 0, 70] = bad
    got, plain = triton(**tensors, causal=True), reference.attention(**tensors, causal=True)
    torch.testing.assert_close(got[:, :31], clean[:, :31], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not got[:, 31:, :, 70].isfinite().any() and got[..., :70].isfinite().all()


@pytest.mark.parametrize("option", ["causal", "shared_bias", "dropout", "sinks"])
def test_same_bits(option: str) -> None:
    tensors, options, wants = with_options(option, dtype=torch.bfloat16)
    first, second = (
        law.run(triton, tensors, {**options, "return_lse": True}, wants, ("o", "lse"), 0) for _ in range(2)
    )
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


PERSISTENT: list[tuple[str, ...]] = [
    ("causal",), ("window", "dropout"), ("mask", "sinks"), ("bias", "softcap"), ("alibi", "causal"), ("packed", "window"),
]  # fmt: skip


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("names", PERSISTENT, ids="+".join)
def test_persistent_grid_has_the_same_bits(
    names: tuple[str, ...], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program does all blocks as if each were alone, also after one on the slow road or beyond its sequence; so do two."""
    packed = names[0] == "packed"
    tensors, options, wants = with_options(*names[packed:], nheads_k=NHEADS)
    tensors["v"][0, 30, 0] = math.nan
    if packed:
        tensors = {n: t[0].repeat(3, 1, 1)[: 75 if n == "q" else 92] for n, t in tensors.items()}
        options |= {"cu_seqlens_q": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K}
    options["return_lse"] = True
    row, run, grids = tuning.row, launch.run, []

    def noting(kernel: Any, grid: tuple[int, ...], *arguments: Any, **how: Any) -> None:
        grids.append((kernel.__name__, *grid))
        run(kernel, grid, *arguments, **how)

    plain = law.run(triton, tensors, options, wants, ("o", "lse"), 0)
    monkeypatch.setattr(launch, "sms", lambda device: programs)
    monkeypatch.setattr(launch, "run", noting)
    monkeypatch.setattr(tuning, "row", lambda *call: persistent(row(*call)))
    several = law.run(triton, tensors, options, wants, ("o", "lse"), 0)
    assert {(f"attention_{name}_kernel", programs) for name in ("fwd", "bwd_dq", "bwd_dkdv")} <= set(grids)
    for name, t in plain.items():
        torch.testing.assert_close(several[name], t, rtol=0, atol=0, equal_nan=True)


def test_gradient_through_lse_and_strided_gradients() -> None:
    """The cotangents are expanded and transposed; that of lse alone passes through delta."""
    leaves = {name: t.requires_grad_() for name, t in qkv().items()}
    expected = torch.autograd.grad(reference.attention(**leaves).sum(), list(leaves.values()))
    for g, e in zip(torch.autograd.grad(triton(**leaves).sum(), list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)

    def lse_of(function: Any) -> Any:
        return lambda **tensors: function(**tensors, causal=True, return_lse=True)[1]

    law.check(lse_of(triton), lse_of(reference.attention), qkv(), wants=("q", "k"), names=("lse",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["window", "softcap", "mask", "bias", "alibi"])
def test_weights(option: str, dtype: torch.dtype) -> None:
    tensors, options, _ = with_options(option, dtype=dtype)
    tensors.pop("v")
    _, lse = reference.attention(**tensors, v=tensors["k"], **options, return_lse=True)

    def weights(run: Any) -> Any:
        return lambda q, k, **kwargs: run(
            q, k, lse.to(torch.float64 if q.dtype == torch.float64 else lse.dtype), **kwargs
        )

    def on_triton(*args: Any, **kwargs: Any) -> Any:
        return attention_weights(*args, backend="triton", **kwargs)

    law.check(weights(on_triton), weights(reference.attention_weights), tensors, options, names=("p",))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 20), (20, 0), (0, 0)])
def test_no_queries_or_no_keys(seqlen_q: int, seqlen_k: int) -> None:
    shapes = [(1, NHEADS, seqlen_q, seqlen_k), (1, 1, seqlen_q, seqlen_k), (NHEADS, 1, seqlen_k), (seqlen_q, 1), (1,)]
    for shape in shapes:
        tensors = qkv(seqlen_q, seqlen_k) | {
            "bias": torch.randn(shape, device=DEVICE),
            "sinks": torch.randn(NHEADS, device=DEVICE),
        }
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=DEVICE)
        holds(tensors, {"mask": mask, "causal": True}, (*QKV, "bias", "sinks"))


def test_explain_prints_the_row_and_the_objections() -> None:
    found = fastattn.explain(attention, **qkv(), backend="triton")
    assert found.chosen == "triton" and isinstance(found.tuning, tuning.Row) and "dkdv" in str(found)
    wide = {name: t.double() for name, t in qkv().items()}
    assert "float64" in fastattn.explain(attention, **wide).objections["triton"][0]
    long = qkv(3, 3, 600)
    assert "headdim up to 576" in fastattn.explain(attention, **long).objections["triton"][0]


def test_every_call_has_a_row() -> None:
    for arch, headdim, kind, width in itertools.product(
        (80, 86, 89, 90, 100, 120), (1, 64, 65, 576), (*tuning.KINDS, *tuning.WIDER), (2, 4)
    ):
        row = tuning.find(arch, headdim, kind, width)
        assert row.headdim >= headdim and row.width == width and row.arch <= arch
        assert row.kind in (kind, tuning.WIDER.get(kind, kind))
    keys = [row[:4] for row in tuning.ROWS]
    assert len(set(keys)) == len(keys) and all(row.source for row in tuning.ROWS)


@pytest.mark.skipif(not launch.INTERPRETED, reason="the interpreter's tiles")
def test_the_interpreter_has_several_tiles() -> None:
    row = tuning.row(80, 16, "dense", 4)
    assert max(row.fwd.BLOCK_M, row.dq.BLOCK_M, row.dkdv.BLOCK_N) < SEQLEN_Q
