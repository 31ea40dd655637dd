"""The reference itself: against torch's SDPA, hand-written loops, finite differences and Philox's test vectors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import law
import pytest
import torch
import torch.nn.functional as F

from fastattn.ops.attention import _philox, _reference, reference
from fastattn.ops.attention.spec import band, check_attention

F64 = torch.float64
BATCH, SEQLEN_Q, SEQLEN_K, NHEADS, NHEADS_K, HEADDIM, HEADDIM_V = 2, 5, 7, 4, 2, 6, 3


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return law.randn(*shape, dtype=F64, seed=seed)


def qkv(seqlen_q: int = SEQLEN_Q, seqlen_k: int = SEQLEN_K) -> dict[str, torch.Tensor]:
    return {
        "q": double(BATCH, seqlen_q, NHEADS, HEADDIM, seed=1),
        "k": double(BATCH, seqlen_k, NHEADS_K, HEADDIM, seed=2),
        "v": double(BATCH, seqlen_k, NHEADS_K, HEADDIM_V, seed=3),
    }


def some_mask() -> torch.Tensor:
    mask = torch.rand(BATCH, 1, SEQLEN_Q, SEQLEN_K) < 0.6
    mask[1, :, 2] = False  # an empty row
    return mask


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "upper_left": {"causal": "upper_left"},
    "window": {"window": (2, 1)},
    "causal_window": {"causal": True, "window": (1, None)},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "mask": {"mask": some_mask},
    "alibi": {"alibi_slopes": lambda: torch.rand(BATCH, NHEADS)},
    "dropout": {"dropout_p": 0.4},
}
TENSORS = {
    "none": {},
    "bias": {"bias": lambda: double(1, NHEADS, SEQLEN_Q, SEQLEN_K, seed=4)},
    "bias_row": {"bias": lambda: double(SEQLEN_K, seed=5)},
    "sinks": {"sinks": lambda: double(NHEADS, seed=6)},
}
CU_SEQLENS = [torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 7, 8], dtype=torch.int32)]


def made(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in options.items()}


def formula(q, k, v, causal, window, scale, softcap, mask, alibi_slopes, bias, sinks):
    """One query at a time, in loops, straight from the contract."""
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=F64)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=F64)
    offset = 0 if causal == "upper_left" else k.shape[1] - q.shape[1]
    left, right = window or (None, None)
    right = 0 if causal else right
    group = q.shape[2] // k.shape[2]
    for b, m, h in itertools.product(*(range(size) for size in q.shape[:3])):
        logits, values = [], []
        for n in range(k.shape[1]):
            distance = m + offset - n
            if (left is not None and distance > left) or (right is not None and -distance > right):
                continue
            if mask is not None and not mask[b, 0, m, n]:
                continue
            s = float(q[b, m, h] @ k[b, n, h // group]) * (q.shape[3] ** -0.5 if scale is None else scale)
            s = s if softcap is None else softcap * math.tanh(s / softcap)
            s -= 0.0 if alibi_slopes is None else float(alibi_slopes[b, h]) * abs(distance)
            s += 0.0 if bias is None else float(bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])[b, h, m, n])
            logits.append(s)
            values.append(v[b, n, h // group])
        if sinks is not None:
            logits.append(float(sinks[h]))
            values.append(torch.zeros(v.shape[3], dtype=F64))
        if logits:
            p = torch.softmax(torch.tensor(logits, dtype=F64), 0)
            o[b, m, h] = sum(weight * value for weight, value in zip(p, values, strict=True))
            lse[b, h, m] = torch.logsumexp(torch.tensor(logits, dtype=F64), 0)
    return o, lse


@pytest.mark.parametrize("extra", TENSORS)
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "dropout"])
def test_matches_loops(option: str, extra: str) -> None:
    options = made({**OPTIONS[option], **TENSORS[extra]})
    o, lse = reference.attention(**qkv(), **options, return_lse=True)
    names = ("causal", "window", "scale", "softcap", "mask", "alibi_slopes", "bias", "sinks")
    expected_o, expected_lse = formula(**qkv(), **{name: options.get(name) for name in names})
    torch.testing.assert_close(o, expected_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_matches_torch(is_causal: bool) -> None:
    t = qkv()
    o = reference.attention(**t, causal="upper_left" if is_causal else False)
    swapped = [x.transpose(1, 2) for x in t.values()]
    expected = F.scaled_dot_product_attention(*swapped, is_causal=is_causal, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extra", TENSORS)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients(option: str, extra: str) -> None:
    """Autograd of the reference against finite differences; the backend's written-out gradients against it."""
    options, more = made(OPTIONS[option]), made(TENSORS[extra])
    leaves = {name: t.requires_grad_() for name, t in {**qkv(), **more}.items()}
    philox = torch.tensor([123, 456])

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(7)
        o, lse = reference.attention(**dict(zip(leaves, tensors, strict=True)), **options, return_lse=True)
        return o, lse.where(lse.isfinite(), 0)  # finite differences of -inf are no numbers

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)

    spec, tensors = _spec_and_tensors(leaves, options, CU=None)
    o, lse = reference.attend(spec, *tensors, philox)
    _compare_gradients(spec, tensors, leaves, o, lse, philox)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "mask"])
def test_gradients_packed(option: str) -> None:
    leaves = {
        "q": double(7, NHEADS, HEADDIM, seed=1).requires_grad_(),
        "k": double(8, NHEADS_K, HEADDIM, seed=2).requires_grad_(),
        "v": double(8, NHEADS_K, HEADDIM_V, seed=3).requires_grad_(),
        "bias": double(3, 1, 4, 5, seed=4).requires_grad_(),
        "sinks": double(NHEADS, seed=6).requires_grad_(),
    }
    options = dict(OPTIONS[option])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(3, NHEADS)
    philox = torch.tensor([1, 2])
    spec, tensors = _spec_and_tensors(leaves, options, CU=CU_SEQLENS)
    o, lse = reference.attend(spec, *tensors, philox)
    _compare_gradients(spec, tensors, leaves, o, lse, philox)


def _spec_and_tensors(leaves, options, CU):
    band_ = band("attention", options.get("causal", False), options.get("window"))
    names = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks")
    tensors = [leaves.get(name, options.get(name)) for name in names] + (CU or [None, None])
    scalars = options.get("scale"), options.get("softcap"), options.get("dropout_p", 0.0)
    return check_attention(*tensors, None, None, *band_, *scalars), tensors


def _compare_gradients(spec, tensors, leaves, o, lse, philox) -> None:
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    expected = torch.autograd.grad((o, lse), list(leaves.values()), (do, dlse))
    found = {name: torch.zeros_like(t) for name, t in leaves.items()}
    q, k, v, *rest = tensors
    gradients = [found["q"], found["k"], found["v"], found.get("bias"), found.get("sinks")]
    _reference.backward(spec, do, dlse, q, k, v, o, lse, *rest, philox, *gradients)
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"d{n}: {text}"
        )


def test_packed_is_the_dense_call_of_each_sequence() -> None:
    q, k, v = double(7, 4, 6, seed=1), double(8, 2, 6, seed=2), double(8, 2, 3, seed=3)
    o, lse = reference.attention(
        q, k, v, causal=True, cu_seqlens_q=CU_SEQLENS[0], cu_seqlens_k=CU_SEQLENS[1], return_lse=True
    )
    ends_q, ends_k = (cu.tolist() for cu in CU_SEQLENS)
    for i in range(3):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        expected = reference.attention(q[None, rows], k[None, keys], v[None, keys], causal=True, return_lse=True)
        torch.testing.assert_close(o[rows], expected[0][0], rtol=0, atol=0)
        torch.testing.assert_close(lse[:, rows], expected[1][0], rtol=0, atol=0)


def test_empty_rows() -> None:
    t = {name: x.requires_grad_() for name, x in qkv(seqlen_q=7, seqlen_k=4).items()}
    o, lse = reference.attention(**t, causal=True, return_lse=True)  # the first three queries see nothing
    assert (o[:, :3] == 0).all() and (lse[..., :3] == -math.inf).all() and lse[..., 3:].isfinite().all()
    dq, dk, dv = torch.autograd.grad((o, lse), list(t.values()), (torch.ones_like(o), torch.ones_like(lse)))
    assert (dq[:, :3] == 0).all() and all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_invisible_keys_have_no_influence(bad: float) -> None:
    """Padding may hold anything; a poisoned key spoils the rows that see it and no other, forward and backward."""
    clean = qkv()
    padded = {name: x.clone() for name, x in clean.items()}
    mask = torch.ones(BATCH, 1, 1, SEQLEN_K, dtype=torch.bool)
    mask[1, ..., 4:] = False
    padded["k"][1, 4:] = bad
    padded["v"][1, 4:] = bad
    wants = ("q", "k", "v")
    options = {"mask": mask, "return_lse": True, "softcap": 2.0}
    expected = law.run(reference.attention, clean, options, wants, ("o", "lse"), 0)
    found = law.run(reference.attention, padded, options, wants, ("o", "lse"), 0)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)

    padded = {name: x.clone() for name, x in clean.items()}
    padded["k"][:, -1] = bad  # causal: only the last query sees it
    found = law.run(reference.attention, padded, {"causal": True}, wants, ("o",), 0)
    assert found["o"][:, :-1].isfinite().all() and found["dq"][:, :-1].isfinite().all()
    assert found["o"][:, -1].isnan().all()


def test_philox_vectors() -> None:
    """The published test vectors of Random123 for Philox4x32-10."""
    full = 0xFFFFFFFF
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    vectors = {
        ((0,) * 4, (0,) * 2): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((full,) * 4, (full,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, key), expected in vectors.items():
        words = _philox.philox4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(int(w) for w in words) == expected


def test_dropout_statistics() -> None:
    """The dropped share is p, rows and heads differ, survivors are scaled, and the seed decides."""
    p = 0.3
    keep = _philox.keep_mask(torch.tensor([5, 6]), p, 0, 2, 3, 64, 101)
    spread = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(float((~keep).double().mean()) - p) < 5 * spread
    assert not (keep[0, 0] == keep[0, 1]).all() and not (keep[0] == keep[1]).all()
    assert (keep[1:] == _philox.keep_mask(torch.tensor([5, 6]), p, 1, 1, 3, 64, 101)).all()
    assert (keep != _philox.keep_mask(torch.tensor([5, 7]), p, 0, 2, 3, 64, 101)).any()
    q = torch.zeros(2, 64, 3, 8, dtype=F64)
    torch.manual_seed(3)
    o = reference.attention(q, q[:, :50], torch.ones(2, 50, 3, 4, dtype=F64), dropout_p=p)
    torch.manual_seed(3)
    survivors = (
        _philox.keep_mask(_philox.draw(q.device), p, 0, 2, 3, 64, 50).double().sum(-1)
    )  # [batch, nheads, seqlen_q]
    torch.testing.assert_close(o[..., 0].transpose(1, 2), survivors / 50 / (1 - p), rtol=1e-12, atol=0)


def test_weights_give_the_true_softmax_gradient() -> None:
    """P(q, k, lse(q, k)): the gradients through scores and through lse add up to that of softmax."""
    t = qkv()
    q, k = (t[name].requires_grad_() for name in ("q", "k"))

    def call(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        _, lse = reference.attention(q, k, k, causal=True, return_lse=True)
        return reference.attention_weights(q, k, lse, causal=True)

    assert torch.autograd.gradcheck(call, (q, k))
    p = call(q, k)
    torch.testing.assert_close(p.sum(-1), torch.ones(BATCH, NHEADS, SEQLEN_Q, dtype=F64))


def test_merge_of_halves_is_the_whole() -> None:
    t = {name: x.requires_grad_() for name, x in qkv().items()}
    mask = torch.rand(BATCH, 1, SEQLEN_Q, SEQLEN_K) < 0.5
    mask[0, :, 1] = False  # empty in both halves
    mask[1, :, 2, 3:] = False  # empty in the second

    def whole(q, k, v):
        return reference.attention(q, k, v, mask=mask, return_lse=True)

    def merged(q, k, v):
        a = reference.attention(q, k[:, :3], v[:, :3], mask=mask[..., :3], return_lse=True)
        b = reference.attention(q, k[:, 3:], v[:, 3:], mask=mask[..., 3:], return_lse=True)
        return reference.merge_attention(*a, *b)

    expected, found = whole(**t), merged(**t)
    cotangents = [torch.randn_like(x) for x in expected]
    for x, y in zip(expected, found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    for x, y in zip(*(torch.autograd.grad(r, list(t.values()), cotangents) for r in (expected, found)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("rope", [None, "half", "interleaved"])
def test_kvcache_is_attention_over_what_the_cache_holds(paged: bool, rope: str | None) -> None:
    lengths, new, capacity = [3, 0, 6], 2, 8
    q, k, v = double(3, new, 4, 8, seed=1), double(3, new, 2, 8, seed=2), double(3, new, 2, 5, seed=3)
    keys, values = double(3, capacity, 2, 8, seed=4), double(3, capacity, 2, 5, seed=5)
    cos, sin = (None, None) if rope is None else (double(9, 3, seed=6), double(9, 3, seed=7))
    table = torch.randperm(12)[:12].view(3, 4).int() if paged else None
    if table is not None:
        caches = [torch.empty(12, 2, 2, d, dtype=F64) for d in (8, 5)]
        for cache, rows in zip(caches, (keys, values), strict=True):
            cache[table.long()] = rows.view(3, 4, 2, 2, -1)
    else:
        caches = [keys.clone(), values.clone()]
    options = {"cos": cos, "sin": sin, "interleaved": rope == "interleaved", "block_table": table}
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32)
    o, lse = reference.attention_kvcache(
        q, *caches, cache_seqlens, k=k, v=v, return_lse=True, window=(4, None), **options
    )
    for i, present in enumerate(lengths):
        angle = slice(present, present + new)

        def turn(x: torch.Tensor, angle: slice = angle) -> torch.Tensor:
            if rope is None:
                return x
            z = torch.complex(cos[angle], sin[angle])[:, None]
            first, second = (x[..., 0:6:2], x[..., 1:6:2]) if rope == "interleaved" else (x[..., :3], x[..., 3:6])
            w = torch.complex(first, second) * z
            pairs = torch.stack((w.real, w.imag), -1).flatten(-2)
            return torch.cat((pairs if rope == "interleaved" else torch.cat((w.real, w.imag), -1), x[..., 6:]), -1)

        all_k, all_v = torch.cat((keys[i, :present], turn(k[i]))), torch.cat((values[i, :present], v[i]))
        expected = reference.attention(
            turn(q[i])[None], all_k[None], all_v[None], causal=True, window=(4, None), return_lse=True
        )
        torch.testing.assert_close(o[i], expected[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[i], expected[1][0], rtol=1e-12, atol=1e-12)
        slots = caches[0][table[i].long()].flatten(0, 1) if table is not None else caches[0][i]
        torch.testing.assert_close(slots[: present + new], all_k)
