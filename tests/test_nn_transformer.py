"""fastattn.nn's transformer layers and from_torch beside torch.nn: results, containers, nested tensors, integration."""

from __future__ import annotations

import copy
import pickle
import unittest.mock
import warnings
from typing import Any

import pytest
import torch
import twins
from torch.utils.checkpoint import checkpoint

import fastattn.nn
from fastattn.nn import LayerNorm, MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer

Tensor = torch.Tensor
MODEL, HEADS, WIDE = 16, 4, 40
KINDS = ("TransformerEncoderLayer", "TransformerDecoderLayer")


def pair(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, equally initialised from the same seed; dropout off unless given."""
    options = {"dropout": 0.0, **options}
    modules = []
    for namespace in (fastattn.nn, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(namespace, kind)(MODEL, HEADS, WIDE, **options).to(dtype))
    return modules[0], modules[1]


def padding(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def causal_mask(seqlen: int) -> Tensor:
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)


def inputs(kind: str, batch_first: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(3, 7, MODEL), (3, 5, MODEL)][: 1 + (kind == KINDS[1])]
    found = [torch.randn(s if batch_first else (s[1], s[0], s[2])).to(dtype).requires_grad_() for s in shapes]
    return found


def masks(kind: str, floating: bool) -> dict[str, Any]:
    own: dict[str, Any] = {"mask": causal_mask(7), "key_padding_mask": padding(7, 4, 2)}
    if floating:
        own = {name: torch.zeros(m.shape).masked_fill(m, float("-inf")) for name, m in own.items()}
    prefix = "tgt_" if kind == KINDS[1] else "src_"
    found = {prefix + name: mask for name, mask in own.items()}
    return found | ({"memory_key_padding_mask": padding(5, 1, 3)} if kind == KINDS[1] else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_law(kind: str, masked: Any, batch_first: bool, norm_first: bool, dtype: torch.dtype) -> None:
    ours, torchs = pair(kind, dtype, norm_first=norm_first, batch_first=batch_first, activation="gelu")
    assert repr(ours) == repr(torchs) and isinstance(ours, type(torchs))
    options = {} if masked is None else masks(kind, masked == "float")
    if dtype == torch.bfloat16:
        options = {k: m.to(dtype) if m.is_floating_point() else m for k, m in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn: nested tensors and masks of two kinds
        twins.check(ours, torchs, *inputs(kind, batch_first, dtype), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_in_training_only(kind: str) -> None:
    ours, torchs = pair(kind, dropout=0.3, batch_first=True)
    x = inputs(kind, True)
    assert not torch.equal(ours(*x), ours(*x))
    torch.manual_seed(1)
    first = ours(*x)
    torch.manual_seed(1)
    assert torch.equal(ours(*x), first)
    ours.eval()
    torch.testing.assert_close(ours(*x), torchs.eval()(*x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("nest", [False, True])
def test_inside_torchs_encoder(norm_first: bool, nest: bool) -> None:
    """In eval without grad torch packs padded input into nested tensors when it can, and zeroes the padding then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, torchs = (
            torch.nn.TransformerEncoder(m, 2, enable_nested_tensor=nest).eval()
            for m in pair(KINDS[0], batch_first=True, norm_first=norm_first)
        )
        x, ignore = torch.randn(3, 7, MODEL), padding(7, 4, 2)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got, expected = (m(x, src_key_padding_mask=ignore) for m in (ours, torchs))
            if nest and not norm_first and not grad:
                assert (got[ignore] == 0).all() and (expected[ignore] == 0).all()
            torch.testing.assert_close(got[~ignore], expected[~ignore], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("norm_first", [False, True])
def test_nested_tensors_in_training(layout: torch.layout, norm_first: bool) -> None:
    ours, _ = pair(KINDS[0], batch_first=True, norm_first=norm_first)
    parts = [torch.randn(n, MODEL) for n in (3, 6, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = ours(x)
    assert y.is_nested and y.layout == layout
    expected = [ours(part) for part in parts]
    gradients = torch.autograd.grad(torch.cat(y.unbind()).square().sum(), list(ours.parameters()))
    wanted = torch.autograd.grad(torch.cat(expected).square().sum(), list(ours.parameters()))
    for got, want in zip(y.unbind(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    largest = max(float(g.abs().max()) for g in wanted)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * largest)
    with pytest.raises(ValueError, match="masks must be None for nested tensors"):
        ours(x, src_key_padding_mask=padding(3, 6, 1))
    ours.self_attn = torch.nn.MultiheadAttention(MODEL, HEADS, batch_first=True)
    with pytest.raises(ValueError, match="self_attn must be fastattn's for nested tensors, got MultiheadAttention"):
        ours(x)


@pytest.mark.parametrize("kind", KINDS)
def test_other_modules_inside_are_called(kind: str) -> None:
    """A norm that someone replaced, and hooks, work as in torch's layer."""
    for norm_first in (False, True):
        ours, torchs = pair(kind, batch_first=True, norm_first=norm_first)
        for layer in (ours, torchs):
            torch.manual_seed(3)
            layer.norm2 = torch.nn.Sequential(torch.nn.Linear(MODEL, MODEL), torch.nn.Tanh())
        hook = unittest.mock.Mock(return_value=None)
        ours.norm1.register_forward_hook(hook)
        ours.self_attn.register_forward_pre_hook(hook)
        x = inputs(kind, True)
        torch.testing.assert_close(ours(*x), torchs(*x), rtol=1e-4, atol=1e-5)
        assert {call.args[0] for call in hook.call_args_list} == {ours.norm1, ours.self_attn}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_state_and_checkpointing(kind: str) -> None:
    ours, torchs = pair(kind, batch_first=True)
    x = inputs(kind, True)
    torchs.load_state_dict(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())
    expected = ours(*x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and torch.equal(twin(*x), expected)
    wanted = torch.autograd.grad(expected.sum(), x)
    got = torch.autograd.grad(checkpoint(ours, *x, use_reentrant=False).sum(), x)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_redraws_the_same_dropout(kind: str) -> None:
    ours, _ = pair(kind, dropout=0.3, batch_first=True)
    x = inputs(kind, True)
    results = []
    for keep in (False, True):
        torch.manual_seed(7)
        y = checkpoint(ours, *x, use_reentrant=False) if keep else ours(*x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    ours, _ = pair(kind, batch_first=True, norm_first=True)
    x, options = inputs(kind, True), masks(kind, False)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    expected, got = ours(*x, **options), compiled(*x, **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), x),
        torch.autograd.grad(expected.square().sum(), x),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    ours, torchs = pair(kind, batch_first=True)
    x = inputs(kind, True)
    truth = copy.deepcopy(torchs).double()(*(t.double() for t in x))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(*x), torchs(*x)
    assert got.dtype == expected.dtype
    assert (got - truth).abs().max() <= 2 * (expected - truth).abs().max()


def test_torchs_type_errors_remain() -> None:
    for module in pair(KINDS[0], batch_first=True):
        with pytest.raises(AssertionError, match="float"):
            module(torch.randn(2, 5, MODEL), src_key_padding_mask=torch.zeros(2, 5, dtype=torch.long))


# ---- from_torch


def test_from_torch_swaps_a_whole_model_and_shares_its_parameters() -> None:
    torch.manual_seed(0)
    model = torch.nn.Transformer(MODEL, HEADS, 2, 2, WIDE, dropout=0.0, batch_first=True)
    src, tgt = torch.randn(2, 6, MODEL), torch.randn(2, 5, MODEL)
    options = {"tgt_mask": causal_mask(5), "src_key_padding_mask": padding(6, 3)}
    expected = model(src, tgt, **options)
    parameters = dict(model.named_parameters())
    assert fastattn.nn.from_torch(model) is model
    assert all(p is parameters[name] for name, p in model.named_parameters())
    torch.testing.assert_close(model(src, tgt, **options), expected, rtol=1e-4, atol=1e-5)
    kinds = {type(m) for m in model.modules()}
    assert {MultiheadAttention, LayerNorm, TransformerEncoderLayer, TransformerDecoderLayer} <= kinds
    assert not kinds & {torch.nn.MultiheadAttention, torch.nn.LayerNorm, torch.nn.TransformerEncoderLayer}


def test_from_torch_leaves_subclasses_alone_and_keeps_sharing() -> None:
    class Own(torch.nn.LayerNorm):
        pass

    norm = torch.nn.LayerNorm(4)
    model = fastattn.nn.from_torch(torch.nn.ModuleList([norm, norm, Own(4), torch.nn.RMSNorm(4)]))
    assert model[0] is model[1] and type(model[0]) is LayerNorm
    assert type(model[2]) is Own and type(model[3]) is fastattn.nn.RMSNorm
    assert type(norm) is torch.nn.LayerNorm and model[0].weight is norm.weight
    assert type(fastattn.nn.from_torch(norm)) is LayerNorm
