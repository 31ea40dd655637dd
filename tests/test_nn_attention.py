"""fastattn.nn.MultiheadAttention beside torch.nn.MultiheadAttention: results, gradients, masks, errors, integration."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
import twins
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import fastattn
from fastattn.nn import MultiheadAttention
from fastattn.nn import attention as room
from fastattn.ops.attention import _philox

Tensor = torch.Tensor
EMBED, HEADS = 24, 4


def pair(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, with the same parameters, none of them zero."""
    torch.manual_seed(seed)
    torchs = torch.nn.MultiheadAttention(EMBED, HEADS, **options)
    for p in torchs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = MultiheadAttention(EMBED, HEADS, **options)
    ours.load_state_dict(torchs.state_dict())
    return ours.to(dtype), torchs.to(dtype)


def causal_mask(seqlen: int) -> Tensor:
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)


def padding(batch: int, seqlen: int) -> Tensor:
    """True = ignore; the first key of every sequence stays."""
    lengths = torch.arange(1, seqlen + 1).flip(0)[torch.arange(batch) % seqlen]
    return torch.arange(seqlen) >= lengths[:, None]


@st.composite
def calls(draw: Any) -> tuple[dict[str, Any], torch.dtype, tuple[Tensor, ...], dict[str, Any]]:
    """(constructor options, dtype, (query, key, value), forward options); every query sees its first key."""
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    kind = draw(st.sampled_from(["self", "cross", "three", "kdim"]))
    batch, seqlen_q, seqlen_k = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seqlen_k = seqlen_q if kind == "self" else seqlen_k
    batched, batch_first = draw(st.booleans()), draw(st.booleans())
    options = {
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": batch_first,
    }
    if kind == "kdim":
        options |= {"kdim": 10, "vdim": 14}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def tokens(seqlen: int, features: int) -> Tensor:
        shape = (
            (seqlen, features)
            if not batched
            else (batch, seqlen, features)
            if batch_first
            else (seqlen, batch, features)
        )
        return randn(*shape).requires_grad_()

    query = tokens(seqlen_q, EMBED)
    key = query if kind == "self" else tokens(seqlen_k, options.get("kdim", EMBED))
    value = key if kind in ("self", "cross") else tokens(seqlen_k, options.get("vdim", EMBED))
    batch = batch if batched else 1
    forward: dict[str, Any] = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    of = draw(st.sampled_from([None, "bool", "float"]))
    if of is not None:
        hidden = torch.rand(batch, seqlen_k, generator=generator) < 0.4
        hidden[:, 0] = False
        mask = hidden if of == "bool" else randn(batch, seqlen_k).masked_fill(hidden, float("-inf"))
        forward["key_padding_mask"] = mask if batched else mask[0]
    shape = draw(st.sampled_from([None, (seqlen_q, seqlen_k), (batch * HEADS, seqlen_q, seqlen_k)]))
    if shape is not None:
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., 0] = False
        # torch deprecates masks of two kinds, and refuses floating ones of another dtype
        forward["attn_mask"] = hidden if (of or "bool") == "bool" else randn(*shape).masked_fill(hidden, float("-inf"))
        if forward["attn_mask"].is_floating_point():
            forward["attn_mask"].requires_grad_(draw(st.booleans()))
        if seqlen_q == seqlen_k and len(shape) == 2 and draw(st.booleans()):
            forward |= {"attn_mask": causal_mask(seqlen_q), "is_causal": True}
            if of == "float":
                forward["attn_mask"] = torch.zeros(shape, dtype=dtype).masked_fill(causal_mask(seqlen_q), float("-inf"))
    return options, dtype, (query, key, value), forward


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=calls())
def test_any_call(call: Any) -> None:
    options, dtype, inputs, forward = call
    note(f"{options} {dtype} {[tuple(x.shape) for x in inputs]} {forward}")
    ours, torchs = pair(dtype=dtype, **options)
    outputs = twins.check(ours, torchs, *inputs, **forward)
    assert len(outputs) == 1 + forward["need_weights"]
    with torch.no_grad():  # torch may take its fused path here
        expected, got = torchs.eval()(*inputs, **forward), ours.eval()(*inputs, **forward)
    assert type(got) is tuple and got[0].shape == expected[0].shape and got[0].dtype == expected[0].dtype
    assert got[0].is_contiguous() and (got[1] is None) == (expected[1] is None)


class Seen(list):
    """The calls of fastattn.attention that a module made."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    calls = Seen()
    real = room.attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "attention", spy)
    return calls


def shape_of(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else tuple(t.shape)


@pytest.mark.parametrize(
    ("of_keys", "of_pairs", "mask", "bias"),
    [
        ("bool", None, (3, 1, 1, 7), None),
        ("float", None, None, (3, 1, 1, 7)),
        (None, "bool", (7, 7), None),
        (None, "float", None, (7, 7)),
        (None, "bool3", (3, HEADS, 7, 7), None),
        ("bool", "bool", (7, 7), (3, 1, 1, 7)),
        ("bool", "bool3", (3, HEADS, 7, 7), None),
        ("bool", "float", (3, 1, 1, 7), (7, 7)),
        ("float", "bool", (7, 7), (3, 1, 1, 7)),
        ("float", "float", None, (3, 1, 7, 7)),
    ],
)
def test_masks_stay_compact(of_keys: Any, of_pairs: Any, mask: Any, bias: Any, seen: Seen) -> None:
    ours, _ = pair(batch_first=True)
    x = torch.randn(3, 7, EMBED)
    keys, pairs = padding(3, 7), causal_mask(7)
    if of_keys == "float":
        keys = torch.zeros(3, 7).masked_fill(keys, float("-inf"))
    if of_pairs == "float":
        pairs = torch.zeros(7, 7).masked_fill(pairs, float("-inf"))
    if of_pairs == "bool3":
        pairs = pairs.expand(3 * HEADS, 7, 7)
    ours(x, x, x, keys if of_keys else None, False, pairs if of_pairs else None)
    [call] = seen
    assert (shape_of(call["mask"]), shape_of(call["bias"])) == (mask, bias)


def test_weights_are_made_only_when_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("attention_weights was called")

    ours, _ = pair()
    x = torch.randn(5, 2, EMBED)
    expected = ours(x, x, x)[0]
    monkeypatch.setattr(room, "attention_weights", refuse)
    got, weights = ours(x, x, x, need_weights=False)
    assert weights is None and torch.equal(got, expected)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("keys", [False, True])
def test_the_hint_is_torchs(need_weights: bool, keys: bool, seen: Seen) -> None:
    """A wrong hint shows which of the two counts: alone without weights the hint, otherwise the mask."""
    ours, torchs = pair(batch_first=True)
    x = torch.randn(2, 6, EMBED)
    anti = torch.ones(6, 6, dtype=torch.bool).tril(-1)
    options = {"attn_mask": anti, "is_causal": True, "need_weights": need_weights}
    if keys:
        options["key_padding_mask"] = torch.zeros(2, 6, dtype=torch.bool)
    torch.testing.assert_close(ours(x, x, x, **options)[0], torchs(x, x, x, **options)[0])
    assert seen[0]["causal"] == (False if keys or need_weights else "upper_left")


def test_a_query_that_sees_no_key() -> None:
    """torch gives NaN; here it is out_proj(0), its weights are 0 and it has no influence on gradients."""
    ours, torchs = pair(batch_first=True)
    x = torch.randn(2, 5, EMBED, requires_grad=True)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True
    assert torchs(x, x, x, attn_mask=mask)[0][:, 2].isnan().all()
    y, weights = ours(x, x, x, attn_mask=mask)
    torch.testing.assert_close(y[:, 2], ours.out_proj.bias.expand(2, -1))
    assert (weights[:, 2] == 0).all() and y.isfinite().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[:, others], torchs(x, x, x, attn_mask=mask)[0][:, others])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()
    (dx,) = torch.autograd.grad(ours(x, x, x, attn_mask=mask, need_weights=False)[0][:, 2].sum(), x)
    assert (dx == 0).all()


# ---- dropout: other elements than torch's, so through the definition of the random bits, and in the mean


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_the_philox_reference(need_weights: bool) -> None:
    ours, torchs = pair(dropout=0.4, batch_first=True)
    x = torch.randn(2, 7, EMBED, requires_grad=True)
    torch.manual_seed(5)
    y, weights = ours(x, x, x, need_weights=need_weights, average_attn_weights=False)
    torch.manual_seed(5)
    keep = _philox.keep_mask(_philox.draw(x.device), 0.4, 0, 2, HEADS, 7, 7)
    p = torchs.eval()(x, x, x, average_attn_weights=False)[1] * keep / 0.6
    value = torch.nn.functional.linear(x, *(t[2 * EMBED :] for t in (torchs.in_proj_weight, torchs.in_proj_bias)))
    heads = p @ value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = torchs.out_proj(heads.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(y, expected)
    if need_weights:
        torch.testing.assert_close(weights, p)
        assert ((weights == 0) == ~keep).all()
    for got, want in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_and_the_rate() -> None:
    """Over many calls the mean is eval's and the rate is p, within five standard errors."""
    ours, _ = pair(dropout=0.25, batch_first=True)
    x = torch.randn(1, 6, EMBED)
    expected = ours.eval()(x, x, x)[0]
    ours.train()
    calls = [ours(x, x, x, average_attn_weights=False) for _ in range(400)]
    outputs = torch.stack([y for y, _ in calls])
    error = (outputs.mean(0) - expected).abs() / (outputs.std(0) / 20)
    assert error.max() < 5
    rate = torch.stack([w == 0 for _, w in calls]).double().mean()
    assert abs(rate - 0.25) < 5 * (0.25 * 0.75 / (400 * HEADS * 36)) ** 0.5
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(ours.eval()(x, x, x)[0], expected)


# ---- torch's containers must not go around us


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_encoder_calls_us_in_eval_without_grad(masked: bool, seen: Seen) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True)
    expected_layer = copy.deepcopy(layer)
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    x = torch.randn(3, 7, EMBED)
    options = {"src_key_padding_mask": padding(3, 7)} if masked else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototype of nested tensors
        for depth in (None, 2):
            pair = [expected_layer, layer]
            if depth is not None:
                pair = [torch.nn.TransformerEncoder(m, depth) for m in pair]
            expected, got = (m.eval()(x, **options) for m in pair)
            valid = ~padding(3, 7) if masked else torch.ones(3, 7, dtype=torch.bool)
            torch.testing.assert_close(got[valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert len(seen) == 3


def test_the_hook_changes_nothing_else() -> None:
    ours, torchs = pair()
    twin = MultiheadAttention.from_torch(MultiheadAttention.from_torch(torchs))
    assert len(twin._forward_hooks) == len(ours._forward_hooks) == 1 and len(torchs._forward_hooks) == 0
    assert twin.in_proj_weight is torchs.in_proj_weight
    assert ours.state_dict().keys() == torchs.state_dict().keys()


# ---- nested and packed sequences


def nested(layout: torch.layout, requires_grad: bool = False) -> Tensor:
    torch.manual_seed(1)
    parts = [torch.randn(n, EMBED) for n in (3, 6, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(parts, layout=layout, requires_grad=requires_grad)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("need_weights", [False, True])
def test_nested_tensors(layout: torch.layout, need_weights: bool) -> None:
    """As one call per sequence, in training too."""
    ours, _ = pair(batch_first=True)
    x, memory = nested(layout, requires_grad=True), nested(layout)
    for key in (x, memory):
        y, weights = ours(x, key, key, need_weights=need_weights, average_attn_weights=False)
        assert y.is_nested and y.layout == layout
        found = y.unbind()
        leaves = [part.detach().requires_grad_() for part in x.unbind()]
        rows = leaves if key is x else [part.detach() for part in memory.unbind()]
        expected = [ours(q, k, k, average_attn_weights=False) for q, k in zip(leaves, rows, strict=True)]
        for i, (got, (want, p)) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            if need_weights:
                n = len(leaves[i])
                torch.testing.assert_close(weights[i, :, :n, :n], p)
                assert (weights[i, :, n:] == 0).all() and (weights[i, :, :, n:] == 0).all()
        (dx,) = torch.autograd.grad(torch.cat(found).square().sum(), x)
        wanted = torch.autograd.grad(sum(y.square().sum() for y, _ in expected), leaves)
        for got, want in zip(dx.unbind(), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_nested_weights_are_torchs() -> None:
    ours, torchs = pair(batch_first=True)
    x = nested(torch.strided)
    with torch.no_grad():
        expected, got = torchs.eval()(x, x, x), ours.eval()(x, x, x)
    torch.testing.assert_close(got[0].values(), expected[0].values(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1])


def test_nested_refusals() -> None:
    ours, _ = pair(batch_first=True)
    x = nested(torch.strided)
    with pytest.raises(ValueError, match="key_padding_mask and attn_mask must be None for nested tensors"):
        ours(x, x, x, key_padding_mask=padding(3, 6))
    with pytest.raises(ValueError, match="all nested when one is, got a mixture"):
        ours(x, torch.randn(3, 6, EMBED), torch.randn(3, 6, EMBED))
    for need_weights in (False, True):
        with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn must be False"):
            pair(batch_first=True, add_zero_attn=True)[0](x, x, x, need_weights=need_weights)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal: bool) -> None:
    ours, _ = pair(batch_first=True)
    x = torch.randn(10, EMBED)
    cu_seqlens = torch.tensor([0, 3, 9, 10], dtype=torch.int32)
    got = ours.forward_packed(x, x, x, cu_seqlens, causal=causal)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        part = x[start:end]
        mask = causal_mask(len(part)) if causal else None
        torch.testing.assert_close(got[start:end], ours(part, part, part, attn_mask=mask)[0], rtol=1e-4, atol=1e-5)


# ---- what any module must bear


def test_state_round_trip_deepcopy_and_pickle() -> None:
    ours, torchs = pair(kdim=10, add_bias_kv=True)
    inputs = torch.randn(4, 2, EMBED), torch.randn(5, 2, 10), torch.randn(5, 2, EMBED)
    expected = ours(*inputs)[0]
    torchs.load_state_dict(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is MultiheadAttention
        assert torch.equal(twin(*inputs)[0], expected)
        assert len(twin._forward_hooks) == 1


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(compiler: str) -> None:
    torch._dynamo.reset()
    ours, _ = pair(batch_first=True)
    x = torch.randn(3, 7, EMBED, requires_grad=True)
    compiled = torch.compile(ours, backend=compiler, fullgraph=True)
    for options in (
        {"key_padding_mask": padding(3, 7), "attn_mask": causal_mask(7)},
        {"attn_mask": causal_mask(7), "is_causal": True, "need_weights": False},
    ):
        expected, got = ours(x, x, x, **options), compiled(x, x, x, **options)
        torch.testing.assert_close(got, expected)
        gradients = [torch.autograd.grad(y[0].square().sum(), x) for y in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_autocast(need_weights: bool, options: dict[str, Any]) -> None:
    ours, torchs = pair(**options)
    x = torch.randn(6, 2, EMBED)
    mask = torch.zeros(6, 6).masked_fill(causal_mask(6), float("-inf"))
    truth = torchs.double()(x.double(), x.double(), x.double(), attn_mask=mask.double())[0]
    torchs.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
        expected = torchs(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    assert (got[0] - truth).abs().max() <= 2 * (expected[0] - truth).abs().max()
    if need_weights:
        assert got[1].dtype == expected[1].dtype


def test_float64_and_double_backward_free_gradcheck() -> None:
    ours, _ = pair(batch_first=True)
    ours.double()
    x = torch.randn(1, 3, EMBED, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ours(x, x, x)[0], x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: ours(x, x, x)[1], x, fast_mode=True)


def test_a_forced_backend_is_obeyed() -> None:
    ours, _ = pair(batch_first=True)
    x = torch.randn(2, 5, EMBED)
    with fastattn.use_backend("reference"):
        got = ours(x, x, x)[0]
    torch.testing.assert_close(got, ours(x, x, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"key_padding_mask": torch.zeros(2, 5, dtype=torch.uint8)},
            AssertionError,
            "boolean or floating, got torch.uint8",
        ),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.long)}, AssertionError, "boolean or floating, got torch.int64"),
        ({"attn_mask": torch.zeros(2, HEADS, 5, 5)}, AssertionError, "attn_mask"),
        ({"attn_mask": torch.zeros(5, 6)}, RuntimeError, r"of shape \(5, 5\), got \(5, 6\)"),
        ({"attn_mask": torch.zeros(2, 5, 5)}, RuntimeError, r"of shape \(8, 5, 5\), got \(2, 5, 5\)"),
        ({"key_padding_mask": torch.zeros(2, 6)}, AssertionError, r"of shape \(2, 5\), got \(2, 6\)"),
        ({"is_causal": True}, RuntimeError, "attn_mask must be given with the is_causal hint"),
        ({"key": torch.randn(2, 5, 7)}, AssertionError, "key must be of 24 features, got 7"),
        ({"query": torch.randn(2, 2, 5, EMBED)}, AssertionError, "query"),
        ({"value": torch.randn(2, 4, EMBED)}, (AssertionError, ValueError), "value"),
    ],
)
def test_errors_are_of_torchs_kind(options: dict[str, Any], error: Any, words: str) -> None:
    ours, torchs = pair(batch_first=True)
    x = torch.randn(2, 5, EMBED)
    call = {"query": x, "key": x, "value": x, **options}
    with pytest.raises(error, match=words):
        ours(**call)
    with pytest.raises((AssertionError, RuntimeError)):
        torchs(**call)
