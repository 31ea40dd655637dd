"""The forward of attention in CUDA C++ for every GPU from sm_80 on, held to the law: on the GPU where there is one, else in
the emulator.

Tiles are 128 queries by 64 or 128 keys, so a query more than a tile and three tiles of keys make all kinds of them. What
holds for every backend is in test_attention.py; here are the tiles' edges and the options in each other's company.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import law
import pytest
import torch
from attention_calls import DEVICE, NHEADS, Calls

import fastattn
from fastattn.ops.attention import _philox, attention, reference, tuning_cuda
from fastattn.runtime import cuda, gpu

if cuda.objections(DEVICE):
    pytest.skip("; ".join(cuda.objections(DEVICE)), allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)
SEQLEN_Q, SEQLEN_K = 40, 150
CALLS = Calls(SEQLEN_Q, SEQLEN_K, headdim=64, dtype=torch.bfloat16, tile=64, window=(31, 16))
qkv, OPTIONS, with_options = CALLS.qkv, CALLS.options, CALLS.with_options


@pytest.fixture(autouse=True)
def portable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hopper has a forward of its own; in the emulator the GPU is an A100."""
    monkeypatch.setattr(cuda, "EMULATED_ARCH", 80)
    with cuda.portable():
        yield


def on_cuda(*args: Any, **kwargs: Any) -> Any:
    return attention(*args, backend="cuda", **kwargs)


def holds(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
    return law.check(on_cuda, reference.attention, tensors, {"return_lse": True, **options})


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, dtype: torch.dtype) -> None:
    holds(*with_options(option, dtype=dtype)[:2])


_SAME = ({"causal", "window"}, {"bias", "shared_bias"})
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if set(pair) not in _SAME]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair_of_options(pair: tuple[str, str]) -> None:
    holds(*with_options(*pair, headdim=24, nheads_k=NHEADS)[:2])


BANDS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": "upper_left"},
    {"window": (1, 2)},
    {"window": (90, None)},
    {"window": (None, 3), "causal": "upper_left"},
]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 1), (1, 257), (128, 128), (129, 383), (257, 65)])
def test_band(seqlen_q: int, seqlen_k: int, band: dict[str, Any]) -> None:
    """Queries before the first key, keys after the last query, and tiles exactly on the edges."""
    holds(qkv(seqlen_q, seqlen_k, nheads=1), band)


def test_scale_that_float32_cannot_hold() -> None:
    holds(qkv(), {"scale": 1e-60, "causal": True})


HEADS = [(8, 8), (40, 24), (80, 80), (96, 128), (128, 64), (192, 128), (192, 192), (256, 256)]


@pytest.mark.parametrize("headdim,headdim_v", HEADS)
def test_headdim(headdim: int, headdim_v: int) -> None:
    holds(qkv(70, 140, headdim, headdim_v, nheads=1), {"causal": True})


@pytest.mark.parametrize("arch", [86, 90])
def test_tiles_of_other_architectures(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries in registers, and two stages at head dimension 128."""
    monkeypatch.setattr(cuda, "EMULATED_ARCH", arch)
    holds(qkv(130, 200, 128, nheads=1), {"causal": True})


@pytest.mark.parametrize("nheads,nheads_k", [(3, 3), (4, 2), (3, 1)])
def test_grouped_heads(nheads: int, nheads_k: int) -> None:
    holds(qkv(nheads=nheads, nheads_k=nheads_k, batch=2), {"causal": True})


@pytest.mark.parametrize("option", ["causal", "mask", "dropout"])
@pytest.mark.parametrize("layout", law.LAYOUTS)
def test_layout(layout: str, option: str) -> None:
    """`sliced` rows start anywhere."""
    holds(*with_options(option, layout=layout, batch=2)[:2])


_SHAPES = [(150,), (40, 1), (2, 1, 150), (2, 1, 1, 150), (2, 1, 40, 150), (1, 2, 40, 1), (1,) * 4]


@pytest.mark.parametrize("shape", _SHAPES)
def test_broadcast_pairs(shape: tuple[int, ...]) -> None:
    """A side that broadcasts is read through stride 0."""
    tensors = qkv(batch=2)
    holds(tensors, {"mask": (torch.rand(shape) < 0.6).to(DEVICE)})
    holds({**tensors, "bias": law.randn(*shape, seed=4).to(DEVICE)}, {})


def test_strided_pairs() -> None:
    mask = (torch.rand(1, 1, SEQLEN_K, SEQLEN_Q) < 0.7).to(DEVICE).transpose(-1, -2).expand(1, NHEADS, -1, -1)
    bias = law.randn(1, 1, SEQLEN_K, SEQLEN_Q, seed=4).to(DEVICE).transpose(-1, -2).expand(1, NHEADS, -1, -1)
    holds({**qkv(), "bias": bias}, {"mask": mask})


@pytest.mark.parametrize("seqlen_k", [260, 263])
def test_tiles_that_a_mask_hides(seqlen_k: int) -> None:
    """Padding on either side, a causal mask as booleans, a hole of two tiles, and a head that sees nothing."""
    padding = torch.ones(2, 1, 1, seqlen_k, dtype=torch.bool)
    padding[0, ..., 40:], padding[1, ..., :200] = False, False
    triangle = torch.ones(2, NHEADS, 130, seqlen_k, dtype=torch.bool).tril(130)
    triangle[0, 0, :, 60:200], triangle[1, 1] = False, False
    for mask in (padding, triangle):
        holds(qkv(130, seqlen_k, batch=2), {"mask": mask.to(DEVICE)})


def test_mask_longer_than_what_is_looked_at_in_advance() -> None:
    """1024 tiles are; here the mask shows a key before and two behind that."""
    seqlen_k = 1024 * 64 + 200
    mask = torch.zeros(1, 1, 1, seqlen_k, dtype=torch.bool)
    mask[..., [77, 1024 * 64 + 5, seqlen_k - 1]] = True
    holds(qkv(3, seqlen_k, 24, nheads=1), {"mask": mask.to(DEVICE)})


@pytest.mark.parametrize("dtype", HALVES)
def test_low_precision_bias_and_sinks(dtype: torch.dtype) -> None:
    tensors, options, _ = with_options("bias", "sinks", dtype=dtype)
    tensors["bias"], tensors["sinks"] = tensors["bias"].to(dtype), tensors["sinks"].to(dtype)
    holds(tensors, options)


@pytest.mark.parametrize("option", ["causal", "window", "dropout", "sinks", "bias", "mask", "alibi"])
def test_packed(option: str) -> None:
    """Ragged batches with a sequence that has no queries and one that has no keys."""
    shapes = {"q": (75, NHEADS, 64), "k": (92, 1, 64), "v": (92, 1, 32)}
    tensors = {
        n: law.randn(*shape, seed=i, dtype=torch.bfloat16).to(DEVICE) for i, (n, shape) in enumerate(shapes.items())
    }
    keywords: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor([0, 0, 33, 34, 75], dtype=torch.int32, device=DEVICE),
        "cu_seqlens_k": torch.tensor([0, 9, 42, 42, 92], dtype=torch.int32, device=DEVICE),
    }
    if option == "bias":
        tensors["bias"] = law.randn(4, NHEADS, 41, 50, seed=4).to(DEVICE)
    elif option == "mask":
        keywords["mask"] = (torch.rand(4, 1, 41, 50) < 0.7).to(DEVICE)
    elif option == "alibi":
        tensors["alibi_slopes"] = torch.rand(4, NHEADS).to(DEVICE)
    else:
        more, settings = OPTIONS[option]
        tensors.update({n: make() for n, make in more.items()})
        keywords.update(settings)
    holds(tensors, keywords)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["batch", "seqlen_q", "seqlen_k"])
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    o, lse = on_cuda(**qkv(seqlen_q, seqlen_k, batch=batch), return_lse=True)
    assert (o == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout_drops_what_the_definition_says(p: float) -> None:
    """With v the identity, o is the matrix of probabilities: its zeros are the dropped pairs."""
    tensors = qkv(SEQLEN_Q, 64, dtype=torch.float16)
    tensors["v"] = torch.eye(64, dtype=torch.float16, device=DEVICE)[None, :, None]
    torch.manual_seed(7)
    philox = _philox.draw(tensors["q"].device)
    torch.manual_seed(7)
    o = on_cuda(**tensors, dropout_p=p)
    keep = _philox.keep_mask(philox, p, 0, 1, NHEADS, SEQLEN_Q, 64)
    assert torch.equal(o.permute(0, 2, 1, 3) != 0, keep)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["keys", "queries"])
def test_what_may_not_be_seen_may_hold_anything(what: str, bad: float, dtype: torch.dtype) -> None:
    """A band, a mask and a bias hide the poison; the tiles it lies in hold visible pairs too."""
    mask = torch.ones(1, 1, SEQLEN_Q, SEQLEN_K, dtype=torch.bool)
    mask[..., 20:22], mask[:, :, 11:13] = False, False
    bias = torch.zeros(1, 1, SEQLEN_Q, SEQLEN_K).masked_fill(torch.arange(SEQLEN_K) == 100, -math.inf)

    def poisoned(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        q, k, v = q.clone(), k.clone(), v.clone()
        if what == "keys":
            k[:, 20], v[:, 21], k[:, 100], v[:, 100] = bad, bad, bad, bad
        else:
            q[:, 11:13] = bad
        return on_cuda(q, k, v, **kwargs)

    options = {"mask": mask.to(DEVICE), "bias": bias.to(DEVICE), "causal": True, "return_lse": True}
    law.check(poisoned, reference.attention, qkv(dtype=dtype), options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_poison_spoils_what_sees_it(bad: float) -> None:
    """One value in one column: the rows before it are as without it, the rows that see it hold what plain PyTorch has."""
    tensors = qkv(150, 150)
    clean = on_cuda(**tensors, causal=True)
    tensors["v"][0, 90, 0, 50] = bad
    got, plain = on_cuda(**tensors, causal=True), reference.attention(**tensors, causal=True)
    assert torch.equal(got[:, :90], clean[:, :90])
    torch.testing.assert_close(got, plain, rtol=2e-2, atol=2e-2, equal_nan=True)
    assert not got[:, 90:, :, 50].isfinite().any() and got[..., :50].isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulator's scheduler")
@pytest.mark.parametrize("option", ["causal", "mask", "dropout"])
def test_same_bits_in_every_order_of_the_threads(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd seeds let copies land early, even ones as late as the program allows."""
    tensors, options, _ = with_options(option)
    run, found = cuda.emulator, []
    for seed in range(4):
        monkeypatch.setattr(cuda, "emulator", functools.partial(run, seed=seed))  # type: ignore[call-arg, arg-type]
        torch.manual_seed(0)
        found.append(on_cuda(**tensors, **options, return_lse=True))
    for o, lse in found[1:]:
        assert torch.equal(o, found[0][0]) and torch.equal(lse, found[0][1])


def test_explain_prints_the_row_and_the_objections() -> None:
    def longer(name: str, seqlen: int) -> dict[str, torch.Tensor]:
        return {name: qkv(1, 1)[name].expand(-1, seqlen, -1, -1)}

    found = fastattn.explain(attention, **qkv(), backend="cuda")
    assert found.chosen == "cuda" and "fwd 128x" in str(found)
    for tensors, words in (
        (qkv(3, 3, 59), "headdim a multiple of 8 up to 256, got 59"),
        (qkv(3, 3, 64, 512), "headdim_v a multiple of 8 up to 256, got 512"),
        (qkv(dtype=torch.float32), "dtype bfloat16 or float16, got torch.float32"),
        (
            {**qkv(1, 1), **longer("k", 1 << 30), **longer("v", 1 << 30)},
            "fewer than 1073741824 keys and queries together, got 1073741825",
        ),
        ({**qkv(1, 1), **longer("q", 1 << 22)}, "up to 4194240 queries, got 4194304"),
    ):
        assert words in fastattn.explain(attention, **tensors).objections["cuda"]


def test_hopper_has_its_own_forward_except_for_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as lifted, cuda.recording(90) as recorded:
        lifted.setattr(cuda, "_portable", False)
        on_cuda(**qkv())
        on_cuda(**qkv(batch=2, layout="expanded"))
        on_cuda(**qkv(layout="sliced"))
        with cuda.portable():
            on_cuda(**qkv())
    names = [launch.kernel.name for launch in recorded.launches]
    assert names == ["attention_fwd_sm90_kernel", *["attention_fwd_kernel"] * 3]


def test_every_call_has_a_row_whose_tiles_fit() -> None:
    for arch, headdim, headdim_v, kind in itertools.product(
        (80, 86, 89, 90, 100, 120), (8, 64, 72, 192, 256), (8, 128, 256), tuning_cuda.KINDS
    ):
        padded = tuning_cuda.widths(headdim, headdim_v)
        row = tuning_cuda.find(arch, *padded, kind)
        assert padded[0] >= headdim and padded[1] >= headdim_v and row.kind == kind and row.source
        assert row.shared << 10 <= gpu.shared_limit(arch)
    keys = [row[:4] for row in tuning_cuda.ROWS]
    assert len(set(keys)) == len(keys)
