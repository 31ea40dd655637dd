"""fastattn.attention on every backend, held to the law; gradients, determinism, aliasing and the cache too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import each
import law
import pytest
import torch
import torch.nn.functional as F
from conftest import forced

import fastattn
from fastattn.ops.attention import (
    attention,
    attention_kvcache,
    attention_weights,
    merge_attention,
    reference,
    scaled_dot_product_attention,
)
from fastattn.ops.attention.backends import BACKENDS

NAMES = [
    b.name for b in BACKENDS if b.name not in ("cuda", "triton")
]  # their own files: on a GPU, emulated or interpreted
DTYPES = law.LOW
QKV = ("q", "k", "v")


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def qkv(
    seqlen_q: int = 19,
    seqlen_k: int = 37,
    headdim: int = 24,
    headdim_v: int | None = None,
    *,
    batch: int = 2,
    nheads: int = 4,
    nheads_k: int = 2,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> dict[str, torch.Tensor]:
    kind = {"dtype": dtype, "layout": layout}
    return {
        "q": law.randn(batch, seqlen_q, nheads, headdim, **kind, seed=1),
        "k": law.randn(batch, seqlen_k, nheads_k, headdim, **kind, seed=2),
        "v": law.randn(batch, seqlen_k, nheads_k, headdim_v or headdim, **kind, seed=3),
    }


def holds(backend: str, tensors: dict[str, torch.Tensor], options: dict[str, Any], wants: tuple[str, ...] = QKV) -> Any:
    options = {"return_lse": True, **options}
    return law.check(forced(attention, backend), reference.attention, tensors, options, wants=wants)


# Every option: what it adds to the tensors and to the keywords of the call of `qkv()`'s default sizes.
def _mask() -> torch.Tensor:
    mask = torch.rand(2, 1, 19, 37) < 0.7
    mask[1, :, 3:5] = False  # empty rows
    return mask


def _bias() -> torch.Tensor:
    bias = law.randn(2, 4, 19, 37, seed=4)
    return bias.masked_fill(torch.rand(bias.shape) < 0.1, -math.inf)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"causal": True}),
    "upper_left": ({}, {"causal": "upper_left"}),
    "window": ({}, {"window": (5, 9)}),
    "scale": ({}, {"scale": 0.5}),
    "softcap": ({}, {"softcap": 3.0}),
    "mask": ({}, {"mask": _mask}),
    "bias": ({"bias": _bias}, {}),
    "alibi": ({"alibi_slopes": lambda: torch.rand(2, 4)}, {}),
    "sinks": ({"sinks": lambda: law.randn(4, seed=5)}, {}),
    "dropout": ({}, {"dropout_p": 0.2}),
}


def with_options(*names: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Any], tuple[str, ...]]:
    tensors, keywords = qkv(dtype=dtype), {}
    for name in names:
        more, settings = OPTIONS[name]
        tensors.update({n: make() for n, make in more.items()})
        keywords.update({n: x() if callable(x) else x for n, x in settings.items()})
    return tensors, keywords, tuple(n for n in tensors if n != "alibi_slopes")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(backend: str, option: str, dtype: torch.dtype) -> None:
    tensors, options, wants = with_options(option, dtype=dtype)
    holds(backend, tensors, options, wants)


PAIRS = [p for p in itertools.combinations(OPTIONS, 2) if p != ("causal", "upper_left")]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair_of_options(backend: str, pair: tuple[str, str]) -> None:
    tensors, options, wants = with_options(*pair, dtype=torch.float32)
    holds(backend, tensors, options, wants)


# Single rows, single keys, fewer keys than queries, and lengths on both sides of every tile edge.
SHAPES = [(1, 1), (1, 239), (113, 203), (63, 65), (64, 128), (65, 17), (129, 257), (200, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True, "upper_left"])
@pytest.mark.parametrize("seqlen_q,seqlen_k", SHAPES)
def test_shape(backend: str, seqlen_q: int, seqlen_k: int, causal: Any, dtype: torch.dtype) -> None:
    holds(backend, qkv(seqlen_q, seqlen_k, 32, batch=1, nheads=2, nheads_k=1, dtype=dtype), {"causal": causal})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequence(backend: str, dtype: torch.dtype) -> None:
    holds(backend, qkv(1023, 1024, 64, batch=1, nheads=1, nheads_k=1, dtype=dtype), {"causal": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headdim", [1, 8, 17, 40, 59, 64, 80, 96, 128, 192, 256])
def test_headdim(backend: str, headdim: int, dtype: torch.dtype) -> None:
    holds(backend, qkv(21, 35, headdim, batch=1, nheads=2, nheads_k=1, dtype=dtype), {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headdim,headdim_v", [(24, 16), (16, 24), (192, 128), (7, 3), (576, 512)])
def test_headdim_v(backend: str, headdim: int, headdim_v: int, dtype: torch.dtype) -> None:
    holds(backend, qkv(13, 35, headdim, headdim_v, batch=1, nheads=2, nheads_k=1, dtype=dtype), {"causal": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nheads,nheads_k", [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1)])
def test_grouped_heads(backend: str, nheads: int, nheads_k: int, dtype: torch.dtype) -> None:
    holds(backend, qkv(33, 18, nheads=nheads, nheads_k=nheads_k, dtype=dtype), {"causal": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", law.LAYOUTS)
def test_layout(backend: str, layout: str, dtype: torch.dtype) -> None:
    holds(backend, qkv(dtype=dtype, layout=layout), {})


@pytest.mark.parametrize(
    "shape", [(37,), (19, 1), (1, 37), (4, 1, 37), (2, 1, 1, 37), (2, 1, 19, 37), (1, 4, 19, 1), (1,) * 4]
)
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_broadcast_pairs(backend: str, kind: str, shape: tuple[int, ...]) -> None:
    if kind == "mask":
        holds(backend, qkv(), {"mask": torch.rand(shape) < 0.6})
    else:
        holds(backend, {**qkv(), "bias": law.randn(*shape, seed=4)}, {}, (*QKV, "bias"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bias_and_sinks(backend: str, dtype: torch.dtype) -> None:
    tensors = {
        **qkv(dtype=dtype),
        "bias": law.randn(4, 19, 37, seed=4).to(dtype),
        "sinks": law.randn(4, seed=5).to(dtype),
    }
    holds(backend, tensors, {}, tuple(tensors))


def test_strided_pairs(backend: str) -> None:
    """Transposed and expanded masks and biases are read where they lie."""
    mask = (torch.rand(2, 1, 37, 19) < 0.7).transpose(-1, -2).expand(2, 4, 19, 37)
    bias = law.randn(1, 4, 37, 19, seed=4).transpose(-1, -2).expand(2, 4, 19, 37)
    holds(backend, {**qkv(), "bias": bias}, {"mask": mask}, (*QKV, "bias"))


CU_SEQLENS_Q = torch.tensor([0, 0, 17, 18, 83], dtype=torch.int32)
CU_SEQLENS_K = torch.tensor([0, 9, 42, 42, 130], dtype=torch.int32)


def packed(dtype: torch.dtype, total_q: int = 83, total_k: int = 130) -> dict[str, torch.Tensor]:
    shapes = {"q": (total_q, 4, 24), "k": (total_k, 2, 24), "v": (total_k, 2, 16)}
    return {name: law.randn(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["plain", "causal", "window", "upper_left", "dropout", "pairs", "alibi"])
def test_packed(backend: str, option: str, dtype: torch.dtype) -> None:
    """Ragged batches, with a sequence that has no queries, one that has no keys, and options per sequence."""
    tensors = packed(dtype)
    keywords: dict[str, Any] = {"cu_seqlens_q": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K}
    wants = QKV
    if option == "pairs":
        tensors["bias"] = law.randn(4, 1, 65, 88, seed=4)
        keywords["mask"] = torch.rand(4, 4, 65, 88) < 0.7
        wants = (*QKV, "bias")
    elif option == "alibi":
        tensors["alibi_slopes"] = torch.rand(4, 4)
    elif option != "plain":
        keywords.update(OPTIONS[option][1])
    holds(backend, tensors, keywords, wants)


def test_packed_defaults(backend: str) -> None:
    """cu_seqlens_k=None is that of q; a given max_seqlen changes nothing."""
    tensors = packed(torch.float32, 83, 83)
    given = forced(attention, backend)(**tensors, cu_seqlens_q=CU_SEQLENS_Q, max_seqlen_q=70, max_seqlen_k=65)
    holds(backend, tensors, {"cu_seqlens_q": CU_SEQLENS_Q})
    assert torch.equal(
        given, forced(attention, backend)(**tensors, cu_seqlens_q=CU_SEQLENS_Q, cu_seqlens_k=CU_SEQLENS_Q)
    )


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["batch", "seqlen_q", "seqlen_k"])
def test_nothing_to_do(backend: str, sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    tensors = {name: t.requires_grad_() for name, t in qkv(seqlen_q, seqlen_k, batch=batch).items()}
    o, lse = forced(attention, backend)(**tensors, return_lse=True)
    assert o.shape == (batch, seqlen_q, 4, 24) and (o == 0).all() and (lse == -math.inf).all()
    for g in torch.autograd.grad(o.sum(), list(tensors.values())):
        assert (g == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["keys", "queries"])
def test_padding_may_hold_anything(backend: str, what: str, bad: float, dtype: torch.dtype) -> None:
    """Keys that nobody sees, or queries that see nothing, hold NaN or inf; nobody notices, forward or backward."""
    mask = torch.ones(2, 1, 19, 37, dtype=torch.bool)
    mask[1, ..., 20:] = False
    mask[1, :, 11:] = False

    def poisoned(q, k, v, **kwargs):
        q, k, v = q.clone(), k.clone(), v.clone()
        if what == "keys":
            k[1, 20:], v[1, 20:] = bad, bad
        else:
            q[1, 11:] = bad
        return forced(attention, backend)(q, k, v, **kwargs)

    law.check(poisoned, reference.attention, qkv(dtype=dtype), {"mask": mask, "return_lse": True}, wants=QKV)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("seqlen,headdim,first", [(40, 24, 30), (320, 64, 30), (320, 64, 290), (320, 16, 200)])
def test_a_poisoned_key_stays_behind_the_diagonal(
    backend: str, seqlen: int, headdim: int, first: int, layout: str, dtype: torch.dtype
) -> None:
    """A NaN key spoils the rows that see it and no other, in the same tile too; tiles without one are read where they lie."""

    def first_rows(run: Any, poison: float, into: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = {name: t.to(into) for name, t in qkv(seqlen, seqlen, headdim, layout=layout, dtype=dtype).items()}
        tensors["k"][:, first], tensors["v"][:, first + 1] = poison, poison
        found = law.run(run, tensors, {"causal": True}, ("q",), ("o",), 0)
        assert found["o"][:, first:].isnan().all() == math.isnan(poison)
        return {name: t[:, :first] for name, t in found.items()}

    got = first_rows(forced(attention, backend), math.nan, dtype)
    plain, truth = (first_rows(reference.attention, 0.0, d) for d in (dtype, torch.float64))
    for name in got:
        law.compare(name, got[name], plain[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(backend: str, dtype: torch.dtype) -> None:
    """Scores up to 30 with gradients; beyond the range of exp, where one key takes all, the forward."""
    tensors = qkv(dtype=dtype)
    tensors["q"] *= 8
    holds(backend, tensors, {"causal": True})
    tensors["q"] *= 64
    found = holds(backend, tensors, {"causal": True}, ())
    assert found["lse"].max() > 1000
    # exp(score - lse) carries the rounding of an lse of thousands, so gradients are only asked to be numbers.
    gradients = law.run(forced(attention, backend), tensors, {"causal": True}, QKV, ("o",), 0)
    assert all(g.isfinite().all() for g in gradients.values())


def test_float64_is_served_by_the_reference() -> None:
    tensors = qkv(dtype=torch.float64)
    o, lse = attention(**tensors, causal=True, return_lse=True)
    expected = reference.attention(**tensors, causal=True, return_lse=True)
    assert o.dtype == lse.dtype == torch.float64
    torch.testing.assert_close((o, lse), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["causal", "bias", "dropout", "sinks"])
def test_same_bits(backend: str, option: str, dtype: torch.dtype) -> None:
    """Over runs and over thread counts, forward and backward."""
    tensors, options, wants = with_options(option, dtype=dtype)
    tensors.update(qkv(130, 150, dtype=dtype) if option != "bias" else {})
    run, found = forced(attention, backend), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(law.run(run, tensors, {**options, "return_lse": True}, wants, ("o", "lse"), 0))
    for name, first in found[0].items():
        if backend == "reference":  # torch's own matmul may split its sums by threads
            torch.testing.assert_close(found[1][name], found[2][name], rtol=0, atol=0)
            continue
        assert all(torch.equal(first, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_whole_cache_lines(backend: str, dtype: torch.dtype) -> None:
    """Several threads may store them around the cache: nothing is lost, and the bits are those of one thread."""
    tensors, run, found = qkv(70, 50, 64, dtype=dtype), forced(attention, backend), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        holds(backend, tensors, {"causal": True}, ())
        found.append(law.run(run, tensors, {"causal": True}, (), ("o",), 0)["o"])
    assert backend == "reference" or torch.equal(*found)


@pytest.mark.parametrize("causal", [False, True, "upper_left"])
def test_many_sequences_that_share_a_bias(backend: str, causal: Any) -> None:
    """Enough of them for long tasks, dealt out with the bias in mind; several tiles of keys."""
    tensors = qkv(290, 140, 16, batch=8, nheads=4)
    tensors["bias"] = law.randn(1, 4, 290, 140, seed=4)
    holds(backend, tensors, {"causal": causal}, ())


def test_a_denormal_result_is_kept() -> None:
    """A quarter of the smallest normal number, in every instruction set."""
    q, k, v = (torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16) for _ in range(3))
    v[:, 1, :, ::3] = 2.0**-126
    for isa in each.ISAS:
        with each.way(f"cpu-{isa}"):
            assert torch.equal(attention(q, k, v), (v[:, 1:2] * 0.25).expand(1, 4, 2, 32)), isa


def test_arguments_are_left_alone(backend: str) -> None:
    tensors, options, wants = with_options("bias", "sinks", "mask", dtype=torch.float32)
    leaves = {name: t.clone().requires_grad_(name in wants) for name, t in tensors.items()}
    o, lse = forced(attention, backend)(**leaves, **options, return_lse=True)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    kept = do.clone(), dlse.clone(), o.clone(), lse.clone()
    torch.autograd.grad((o, lse), [leaves[name] for name in wants], (do, dlse))
    for before, after in zip(kept, (do, dlse, o, lse), strict=True):
        assert torch.equal(before, after)
    for name, t in tensors.items():
        assert torch.equal(t, leaves[name]), name


def test_expanded_and_transposed_output_gradients(backend: str) -> None:
    """sum().backward() hands over a gradient with stride 0."""
    leaves = {name: t.requires_grad_() for name, t in qkv().items()}
    run = forced(attention, backend)
    expected = torch.autograd.grad(run(**leaves), list(leaves.values()), torch.ones(2, 19, 4, 24))
    summed = torch.autograd.grad(run(**leaves).sum(), list(leaves.values()))
    wide = torch.ones(2, 24, 4, 19).transpose(1, 3)
    transposed = torch.autograd.grad(run(**leaves), list(leaves.values()), wide)
    for e, s, t in zip(expected, summed, transposed, strict=True):
        assert torch.equal(e, s) and torch.equal(e, t)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    run = forced(attention, backend)
    law.check(run, reference.attention, qkv(), {"causal": True}, wants=(wanted,), names=("o",))


def test_gradient_through_lse_alone(backend: str) -> None:
    def lse_of(function: Any) -> Any:
        return lambda **tensors: function(**tensors, causal=True, return_lse=True)[1]

    run, plain = lse_of(forced(attention, backend)), lse_of(reference.attention)
    law.check(run, plain, qkv(), wants=("q", "k"), names=("lse",))


def test_finite_differences(backend: str) -> None:
    """A check that shares no code with the reference: the slope of the loss along a random direction."""
    tensors = {name: t.requires_grad_() for name, t in qkv(9, 11, 8).items()}
    run = forced(attention, backend)
    weight = torch.randn(2, 9, 4, 8)

    def loss(step: float, along: list[torch.Tensor]) -> float:
        moved = [t.detach() + step * d for t, d in zip(tensors.values(), along, strict=True)]
        return float((run(*moved, causal=True).double() * weight).sum())

    gradients = torch.autograd.grad((run(**tensors, causal=True) * weight).sum(), list(tensors.values()))
    along = [torch.randn_like(t) for t in tensors.values()]
    slope = float(sum((g * d).sum() for g, d in zip(gradients, along, strict=True)))
    h = 1e-2
    measured = (8 * (loss(h, along) - loss(-h, along)) - (loss(2 * h, along) - loss(-2 * h, along))) / (12 * h)
    assert abs(measured - slope) < 1e-3 * (1 + abs(slope))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["causal", "softcap", "mask", "bias", "alibi"])
def test_weights(backend: str, option: str, dtype: torch.dtype) -> None:
    tensors, options, _ = with_options(option, dtype=dtype)
    tensors.pop("v")

    def weights(q, k, run=forced(attention_weights, backend), **kwargs):  # noqa: B008
        exact = {
            n: t.double() if torch.is_tensor(t) and t.dtype == torch.float32 and n == "bias" else t
            for n, t in kwargs.items()
        }
        _, lse = reference.attention(
            q.detach().double(), k.detach().double(), k.detach().double(), **exact, return_lse=True
        )
        return run(q, k, lse if q.dtype == torch.float64 else lse.float(), **kwargs)

    def plain(q, k, **kwargs):
        return weights(q, k, run=reference.attention_weights, **kwargs)

    law.check(weights, plain, tensors, options, wants=("q", "k"), names=("p",))


def test_merge(backend: str) -> None:
    """Attention over two halves of the keys, merged, is attention over all, with gradients."""
    run = forced(attention, backend)

    def halves(q, k, v, **kwargs):
        a = run(q, k[:, :15], v[:, :15], return_lse=True)
        return merge_attention(*a, *run(q, k[:, 15:], v[:, 15:], return_lse=True))

    def whole(q, k, v, **kwargs):
        return reference.attention(q, k, v, return_lse=True)

    law.check(halves, whole, qkv(), wants=QKV)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dims", [3, 4])
def test_sdpa_is_torchs(is_causal: bool, dims: int) -> None:
    q, k, v = (torch.randn(2, 3, n, 16)[(slice(None),) * (dims == 4) or 0] for n in (9, 12, 12))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=is_causal), expected)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_sdpa_masks(kind: str) -> None:
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 8)
    mask = torch.rand(2, 1, 9, 12) < 0.6 if kind == "bool" else torch.randn(9, 12)
    mask[..., 0] = True if kind == "bool" else 0.0
    options = {"attn_mask": mask, "enable_gqa": True, "scale": 0.3}
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
    )


def test_explain_names_the_backend_and_the_reasons() -> None:
    t = qkv(dtype=torch.float64)
    found = fastattn.explain(attention, **t)
    assert found.chosen == "reference" and "dtype" in found.objections["cpu"][0]
    with pytest.raises(fastattn.UnsupportedError, match=r"attention: backend 'cpu' does not take this call"):
        attention(**t, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("variant", ["plain", "append", "paged", "rope", "options", "splits"])
def test_kvcache(backend: str, variant: str, seqlen_q: int, dtype: torch.dtype) -> None:
    batch, capacity, nheads, nheads_k, headdim, headdim_v = 3, 48, 8, 2, 24, 16
    kind = {"dtype": dtype}
    tensors = {
        "q": law.randn(batch, seqlen_q, nheads, headdim, **kind, seed=1),
        "k_cache": law.randn(batch, capacity, nheads_k, headdim, **kind, seed=2),
        "v_cache": law.randn(batch, capacity, nheads_k, headdim_v, **kind, seed=3),
    }
    lengths = torch.tensor([44, 0, 19], dtype=torch.int32)
    options: dict[str, Any] = {"cache_seqlens": lengths, "return_lse": True}
    if variant in ("append", "rope", "paged"):
        tensors["k"] = law.randn(batch, seqlen_q, nheads_k, headdim, **kind, seed=4)
        tensors["v"] = law.randn(batch, seqlen_q, nheads_k, headdim_v, **kind, seed=5)
    if variant == "rope":
        angle = torch.outer(torch.arange(50.0), 10000 ** -(torch.arange(8) / 8))
        options.update(cos=angle.cos(), sin=angle.sin(), interleaved=True)
    if variant == "paged":
        options["block_table"] = torch.randperm(12).view(3, 4).int()
        for name in ("k_cache", "v_cache"):
            tensors[name] = tensors[name].reshape(12, 12, nheads_k, -1)
    if variant == "options":
        options.update(
            window=(11, None), softcap=4.0, alibi_slopes=torch.rand(nheads), sinks=torch.randn(nheads), scale=0.3
        )
    if variant == "splits":
        options["num_splits"] = 3
    if variant != "paged":
        for i, length in enumerate(lengths.tolist()):  # slots beyond the length hold anything
            tensors["k_cache"][i, length:] = math.nan
            tensors["v_cache"][i, length:] = math.inf

    def cached(function):
        def call(k_cache, v_cache, **kwargs):
            caches = k_cache.clone(), v_cache.clone()
            o, lse = function(k_cache=caches[0], v_cache=caches[1], **kwargs)
            return (o, lse, *caches)

        return call

    with torch.no_grad():
        law.check(
            cached(forced(attention_kvcache, backend)), cached(reference.attention_kvcache), tensors, options,
            names=("o", "lse", "k_cache", "v_cache"),
        )  # fmt: skip


def test_kvcache_is_not_copied(backend: str) -> None:
    """A view into a larger buffer is read and written where it lies."""
    store = torch.zeros(2, 2, 16, 1, 8)
    k_cache, v_cache = store[0], store[1]
    k, v = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8)
    lengths = torch.tensor([3, 15], dtype=torch.int32)
    version = store._version
    forced(attention_kvcache, backend)(torch.randn(2, 1, 4, 8), k_cache, v_cache, lengths, k=k, v=v)
    assert torch.equal(store[0, 0, 3], k[0, 0]) and torch.equal(store[1, 1, 15], v[1, 0])
    assert int((store != 0).any(-1).sum()) == 4 and store._version > version
