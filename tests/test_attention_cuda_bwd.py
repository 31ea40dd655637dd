"""The CUDA kernels of attention's backward, held to the law: on the GPU where there is one, else in the emulator.

Any forward pairs with any backward, so the reference's serves here. In the emulator tiles are 32 wide, so lengths around 80
make whole, masked and skipped ones.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import law
import pytest
import torch
from attention_calls import DEVICE, NHEADS, Calls

from fastattn.ops.attention import _cuda, _reference, attention, reference, tuning_cuda, tuning_cuda_bwd
from fastattn.runtime import cuda, gpu

EMULATED = DEVICE == "cpu"
if cuda.objections(DEVICE):
    pytest.skip(f"the backend cuda needs {'; '.join(cuda.objections(DEVICE))}", allow_module_level=True)
DTYPES = (torch.bfloat16, torch.float16)
QKV = ("q", "k", "v")
SEQLEN_Q, SEQLEN_K = 70, 85
CALLS = Calls(SEQLEN_Q, SEQLEN_K, headdim=32, dtype=torch.bfloat16, tile=32, window=(11, 6))
qkv, OPTIONS, with_options = CALLS.qkv, CALLS.options, CALLS.with_options


SMALL = {
    False: tuning_cuda_bwd.Row(0, 256, False, tuning_cuda_bwd.Dkdv(32, 32, 2, 1), "ordered"),
    True: tuning_cuda_bwd.Row(0, 256, True, tuning_cuda_bwd.Dkdv(32, 32, 1, 2), "ordered"),
}
APART = {False: tuning_cuda_bwd.Dq(32, 32, 2), True: tuning_cuda_bwd.Dq(32, 16, 2)}  # dq in a kernel of its own


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Of the kernels for every GPU, not of Hopper's."""
    with cuda.portable(), tuning_cuda_bwd.tried(*SMALL.values()) if EMULATED else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def reference_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of floats: in 16 bits its scores are rounded, and the backward takes their lse for that of unrounded ones."""

    def forward(spec: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> None:
        _reference.forward(spec, q.float(), k.float(), v.float(), *others)

    monkeypatch.setattr(_cuda, "forward", forward)


def on_cuda(*args: Any, **kwargs: Any) -> Any:
    return attention(*args, backend="cuda", **kwargs)


def holds(
    tensors: dict[str, torch.Tensor], options: dict[str, Any], wants: tuple[str, ...] = QKV, terms: float = 0.0
) -> Any:
    return law.check(on_cuda, reference.attention, tensors, {"return_lse": True, **options}, wants=wants, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, dtype: torch.dtype) -> None:
    holds(*with_options(option, dtype=dtype))


@pytest.fixture
def apart() -> Iterator[None]:
    """Two kernels that compute the scores twice."""
    with tuning_cuda_bwd.tried(*(row._replace(dq=APART[pairs]) for pairs, row in SMALL.items())):
        yield


@pytest.fixture
def unordered() -> Iterator[None]:
    with tuning_cuda_bwd.tried(*(row._replace(dq="unordered") for row in SMALL.values())):
        yield


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("option", OPTIONS)
def test_dq_apart(option: str) -> None:
    holds(*with_options(option))


@pytest.mark.usefixtures("unordered")
@pytest.mark.parametrize("option", ["causal", "window", "mask", "bias"])
def test_dq_in_any_order(option: str) -> None:
    holds(*with_options(option))


@pytest.mark.parametrize("nheads,nheads_k", [(3, 3), (2, 1)])
def test_heads_that_take_turns(nheads: int, nheads_k: int) -> None:
    """Short sequences, so that several heads do, and a last group that is smaller; queries that see no key are written too."""
    holds(qkv(100, 40, batch=3, nheads=nheads, nheads_k=nheads_k), {"causal": True})


def turns(**options: Any) -> bool:
    """Does a backward add up dq in turns?"""
    tensors = {name: t.requires_grad_() for name, t in qkv().items()}
    with cuda.recording(90) as recorded:
        on_cuda(**tensors, **options).sum().backward()
    (launch,) = (one for one in recorded.launches if one.kernel.name == "attention_bwd_dkdv_kernel")
    names = [field[0] for field in launch.kernel.layout.fields]
    return launch.values[names.index("dq_turns")] is not None


@pytest.mark.usefixtures("unordered")
def test_deterministic_calls_never_add_in_any_order() -> None:
    assert not turns() and not turns(deterministic=False) and turns(deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert turns() and not turns(deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_calls_are_deterministic_unless_a_row_says_otherwise() -> None:
    assert turns() and all(row.dq != "unordered" for row in (*tuning_cuda_bwd.ROWS, *tuning_cuda_bwd.SEPARATE))


_SAME = ({"causal", "window"}, {"bias", "shared_bias"})
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if set(pair) not in _SAME]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair_of_options(pair: tuple[str, str]) -> None:
    tensors, options, wants = with_options(*pair, headdim=8, nheads_k=NHEADS)
    if "bias" in tensors:
        tensors["bias"] = tensors["bias"].to(torch.bfloat16)
    holds(tensors, options, wants)


BANDS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": "upper_left"},
    {"window": (1, 2)},
    {"window": (40, None)},
    {"window": (None, 3), "causal": "upper_left"},
]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 1), (1, 140), (128, 128), (33, 97), (130, 34)])
def test_band(seqlen_q: int, seqlen_k: int, band: dict[str, Any]) -> None:
    """Queries before the first key, keys after the last query, and tiles exactly on the edges."""
    holds(qkv(seqlen_q, seqlen_k, nheads=1), band)


@pytest.mark.parametrize("headdim,headdim_v", [(40, 24), (96, 80), (64, 128), (192, 128), (256, 256)])
def test_headdim(headdim: int, headdim_v: int) -> None:
    holds(qkv(35, 45, headdim, headdim_v, nheads=1), {"causal": True})


@pytest.mark.parametrize("option", ["causal", "mask", "dropout"])
@pytest.mark.parametrize("nheads,nheads_k", [(3, 3), (4, 2), (3, 1)])
def test_grouped_heads(nheads: int, nheads_k: int, option: str) -> None:
    tensors, options, _ = with_options(option, nheads=nheads, nheads_k=nheads_k)
    if option == "mask":
        options["mask"] = (torch.rand(1, nheads, SEQLEN_Q, SEQLEN_K) < 0.5).to(DEVICE)
        options["mask"][:, 1, :, :64] = False
    holds(tensors, options)


@pytest.mark.parametrize("layout", law.LAYOUTS)
def test_layout(layout: str) -> None:
    holds(qkv(layout=layout, batch=2), {})


@pytest.mark.parametrize("shape", [(85,), (70, 1), (2, 1, 85), (2, 1, 1, 85), (2, 1, 70, 85), (1, 2, 70, 1), (1,) * 4])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_broadcast_pairs(kind: str, shape: tuple[int, ...]) -> None:
    """A side that broadcasts is read through stride 0, and its gradient is the sum over it.

    terms: the dS of a query are of size sqrt(headdim) and cancel, up to the rounding of o, from which delta is made.
    """
    tensors = qkv(batch=2, headdim=8)
    if kind == "mask":
        holds(tensors, {"mask": (torch.rand(shape) < 0.6).to(DEVICE)})
    else:
        holds({**tensors, "bias": law.randn(*shape, seed=4).to(DEVICE)}, {}, (*QKV, "bias"), terms=8**0.5)


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


@pytest.mark.parametrize("dtype", DTYPES)
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
    tensors = {n: law.randn(*s, seed=i, dtype=torch.bfloat16).to(DEVICE) for i, (n, s) in enumerate(shapes.items())}
    keywords: dict[str, Any] = {"cu_seqlens_q": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K}
    wants = QKV
    if option in ("bias", "shared_bias"):
        shape = (4, NHEADS, 41, 50) if option == "bias" else (NHEADS, 41, 50)
        tensors["bias"] = law.randn(*shape, seed=4, dtype=torch.bfloat16).to(DEVICE)
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
    for g in torch.autograd.grad(on_cuda(**tensors).sum(), list(tensors.values())):
        assert (g == 0).all()


@pytest.mark.parametrize("shape", [(1, NHEADS, 0, 20), (1, NHEADS, 20, 0)])
def test_no_queries_or_no_keys_with_a_bias(shape: tuple[int, ...]) -> None:
    seqlen_q, seqlen_k = shape[2:]
    for sizes in (shape, (1, 1, seqlen_q, seqlen_k), (NHEADS, 1, seqlen_k), (seqlen_q, 1), (1,)):
        tensors = qkv(seqlen_q, seqlen_k) | {
            "bias": torch.randn(sizes, device=DEVICE),
            "sinks": torch.randn(NHEADS, device=DEVICE),
        }
        holds(tensors, {"causal": True}, (*QKV, "bias", "sinks"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_do_not_exist_have_no_weight(dtype: torch.dtype) -> None:
    """Scores of -136: a key of zeros behind the last one would have the weight exp(136)."""
    tensors = qkv(64, 45, dtype=dtype)
    tensors["q"][..., 0], tensors["k"][..., 0] = 64, -12
    got = law.run(on_cuda, tensors, {}, QKV, ("o",), 0)
    assert all(g.isfinite().all() for g in got.values()) and got["dq"].abs().amax() < 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["keys", "queries"])
def test_what_may_not_be_seen_may_hold_anything(what: str, bad: float, dtype: torch.dtype) -> None:
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
        return on_cuda(q, k, v, **kwargs)

    options = {"mask": mask.to(DEVICE), "bias": bias.to(DEVICE), "causal": True, "return_lse": True}
    law.check(poisoned, reference.attention, qkv(dtype=dtype), options, wants=QKV)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_poison_spoils_what_sees_it(bad: float) -> None:
    """One key in a tile that earlier queries see a part of, on the road of plain causal calls."""
    tensors = qkv(64, 64)
    clean = law.run(on_cuda, tensors, {"causal": True}, QKV, ("o",), 0)["dq"]
    tensors["k"][:, 45, :, 3] = bad
    got, plain = (law.run(f, tensors, {"causal": True}, QKV, ("o",), 0) for f in (on_cuda, reference.attention))
    assert torch.equal(got["dq"][:, :45], clean[:, :45])
    for name in ("dq", "dk", "dv"):
        assert torch.equal(got[name].isfinite(), plain[name].isfinite()), name


def test_poisoned_gradients_of_rows_that_see_nothing() -> None:
    """Their dout may hold NaN, and reaches neither dk nor dv; that of a row that sees keys reaches those, and no others."""
    tensors = {name: t.requires_grad_() for name, t in qkv(40, 40).items()}
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[:, :, 7], mask[:, :, 9, 20:] = False, False
    o = on_cuda(**tensors, mask=mask.to(DEVICE))
    for row, spoiled in ((7, 0), (9, 20)):
        dout = torch.ones_like(o)
        dout[:, row] = math.nan
        _, dk, dv = torch.autograd.grad(o, list(tensors.values()), dout, retain_graph=True)
        for g in (dk, dv):
            assert not g[:, :spoiled].isfinite().any() and g[:, spoiled:].isfinite().all()


def test_gradient_through_lse_and_strided_gradients() -> None:
    """The cotangents are expanded and transposed; that of lse alone passes through delta."""
    leaves = {name: t.requires_grad_() for name, t in qkv().items()}
    expected = torch.autograd.grad(reference.attention(**leaves).sum(), list(leaves.values()))
    for g, e in zip(torch.autograd.grad(on_cuda(**leaves).sum(), list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=2e-2, atol=2e-2)

    def lse_of(function: Any) -> Any:
        return lambda **tensors: function(**tensors, causal=True, return_lse=True)[1]

    law.check(lse_of(on_cuda), lse_of(reference.attention), qkv(), wants=("q", "k"), names=("lse",))


@pytest.mark.parametrize("option", ["causal", "shared_bias", "dropout", "sinks", "mask"])
def test_same_bits(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the threads run in another order and copies land at other times."""
    tensors, options, wants = with_options(option)
    found = []
    for seed in (1, 2):
        if EMULATED:
            import emulator

            monkeypatch.setattr(cuda, "emulator", functools.partial(emulator.run, seed=seed))
        found.append(law.run(on_cuda, tensors, {**options, "return_lse": True}, wants, ("o", "lse"), 0))
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name]), name


TILES = [(64, 64, 90, False), (96, 96, 80, False), (128, 128, 80, False), (192, 128, 80, False), (64, 64, 90, True)]


@pytest.mark.skipif(not EMULATED, reason="a GPU runs its own row")
@pytest.mark.parametrize("headdim,headdim_v,arch,pairs", TILES)
def test_shipped_tiles(headdim: int, headdim_v: int, arch: int, pairs: bool) -> None:
    """What the small tiles do not have: several blocks of 16 rows per warp, panels, the exchange through shared memory."""
    with tuning_cuda_bwd.tried(tuning_cuda_bwd.find(arch, max(headdim, headdim_v), pairs)):
        holds(qkv(150, 140, headdim, headdim_v, nheads=1), {"causal": True, **({"softcap": 2.0} if pairs else {})})


def test_every_call_has_a_row_that_fits() -> None:
    for arch, headdim, headdim_v, pairs in itertools.product(
        (80, 86, 89, 90, 100, 120), (8, 64, 72, 128, 136, 192, 256), (8, 128, 256), (False, True)
    ):
        limit, heads = gpu.shared_limit(arch), max(headdim, headdim_v)
        assert heads <= 64 or tuning_cuda_bwd.find(arch, heads, pairs).shared > 99 or gpu.shared_limit(arch) >> 10 == 99
        for row in (tuning_cuda_bwd.find(arch, heads, pairs), *tuning_cuda_bwd.candidates(arch, heads, pairs)):
            assert row.headdim >= heads and row.pairs == pairs and 64 <= row.dkdv.threads <= 256
            assert row.fits(limit, *tuning_cuda.widths(headdim, headdim_v))
    assert len({row[:3] for row in tuning_cuda_bwd.ROWS}) == len(tuning_cuda_bwd.ROWS)
