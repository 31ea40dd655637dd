"""fastattn.nn.LayerNorm and RMSNorm beside torch's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import law
import pytest
import torch
import twins

from fastattn.nn import LayerNorm, RMSNorm

BOTH = [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    for p in module.parameters():
        torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return module


@pytest.mark.parametrize("dtype", law.LOW)
@pytest.mark.parametrize("shape", [(24,), (3, 8), (2, 3, 4)])
@pytest.mark.parametrize(
    ("ours", "torchs", "options"),
    [(*both, o) for both in BOTH for o in ({}, {"elementwise_affine": False}, {"eps": 1e-2})]
    + [(*BOTH[0], {"bias": False}), (*BOTH[1], {"eps": None})],
)
def test_the_law(ours: Any, torchs: Any, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = ours(shape, **options), randomised(torchs(shape, **options))
    assert repr(a) == repr(b) and isinstance(a, torchs) and a.state_dict().keys() == b.state_dict().keys()
    x = law.randn(2, 5, *shape, dtype=dtype).requires_grad_()
    [y] = twins.check(a.to(dtype), b.to(dtype), x)
    assert y.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "torchs"), BOTH)
def test_small_inputs_show_eps(ours: Any, torchs: Any, dtype: torch.dtype) -> None:
    """eps=None is the machine epsilon of float32, in bfloat16 too: at 1e-4 it decides the result."""
    x = (1e-4 * law.randn(4, 32)).to(dtype)
    torch.testing.assert_close(ours(32).to(dtype)(x), torchs(32).to(dtype)(x))


@pytest.mark.parametrize(("ours", "torchs"), BOTH)
@pytest.mark.parametrize("shape", [(24,), (3, 8)])
def test_residual(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    norm, plain = ours(shape), randomised(torchs(shape))
    norm.load_state_dict(plain.state_dict())
    x, residual = (law.randn(2, 5, *shape, seed=i).requires_grad_() for i in range(2))
    y, total = norm(x, residual=residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, plain(x + residual))
    (dx, dresidual) = torch.autograd.grad((y.sin() + total.cos()).sum(), (x, residual))
    (expected,) = torch.autograd.grad((plain(x + residual).sin() + (x + residual).cos()).sum(), x)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(dx, dresidual)


def nested(layout: torch.layout, seed: int = 0, lengths: tuple[int, ...] = (5, 3)) -> Any:
    parts = [law.randn(n, 3, 8, seed=seed + n) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("ours", [LayerNorm, RMSNorm])
def test_nested_tensors_are_normalised_row_by_row(ours: Any, layout: torch.layout) -> None:
    norm = randomised(ours((3, 8)))
    x, residual = nested(layout), nested(layout, seed=9)
    if layout == torch.jagged:  # torch adds jagged tensors of the same offsets alone
        residual = torch.nested.nested_tensor_from_jagged(residual.values().detach().requires_grad_(), x.offsets())
    y, total = norm(x, residual=residual)
    assert y.is_nested and y.layout == total.layout == layout
    for found, alone in ((norm(x), (norm(part) for part in x.unbind())), (total, (x + residual).unbind())):
        for a, b in zip(found.unbind(), alone, strict=True):
            assert torch.equal(a, b)
    pairs = zip(x.unbind(), residual.unbind(), strict=True)
    for a, (part, other) in zip(y.unbind(), pairs, strict=True):
        assert torch.equal(a, norm(part, residual=other)[0])
    leaves = (residual, *norm.parameters())
    whole = torch.autograd.grad(sum(a.sin().sum() for a in y.unbind()), leaves)
    plain = sum(norm(a, residual=b)[0].sin().sum() for a, b in zip(x.unbind(), residual.unbind(), strict=True))
    for a, b in zip(whole, torch.autograd.grad(plain, leaves), strict=True):
        pairs = zip(a.unbind(), b.unbind(), strict=True) if a.is_nested else [(a, b)]
        for one, other in pairs:
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_that_do_not_fit_are_refused_in_words(layout: torch.layout) -> None:
    x = nested(layout)
    with pytest.raises(ValueError, match="rms_norm: residual must be"):
        RMSNorm((3, 8))(x, residual=torch.randn(8, 3, 8))
    with pytest.raises(ValueError, match="layer_norm: residual must be"):
        LayerNorm((3, 8))(x, residual=nested(layout, lengths=(3, 5)))
    with pytest.raises(ValueError, match="residual must be a plain tensor, as x is"):
        LayerNorm((3, 8))(torch.randn(8, 3, 8), residual=x)
    with pytest.raises(ValueError, match="ragged before its last 3 dimensions, got 4 dimensions, ragged in number 1"):
        RMSNorm((8, 3, 8))(x)


def test_rounding_of_llama() -> None:
    theirs_of = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = law.randn(3, 7, 64, dtype=torch.bfloat16)
    theirs = randomised(theirs_of.LlamaRMSNorm(64, eps=1e-6)).bfloat16()
    norm = RMSNorm(64, eps=1e-6, rounding="llama").bfloat16()
    norm.load_state_dict(theirs.state_dict())
    different = (norm(x) != theirs(x)).double().mean()
    norm.rounding = "last"
    assert different < 0.01 < (norm(x) != theirs(x)).double().mean()


@pytest.mark.parametrize(("ours", "torchs"), BOTH)
def test_strided_mixed_and_float64_inputs(ours: Any, torchs: Any) -> None:
    norm, plain = ours(6), randomised(torchs(6))
    norm.load_state_dict(plain.state_dict())
    x = law.randn(4, 6, 5).transpose(1, 2)
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(norm(x, residual=x)[0], plain(x + x))
    got = norm(x.bfloat16())
    assert got.dtype == plain(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm.double()(x.double()), plain.double()(x.double()))


@pytest.mark.parametrize(("ours", "torchs"), BOTH)
def test_shapes_that_do_not_fit_are_refused_by_torch(ours: Any, torchs: Any) -> None:
    for module in (ours((3, 8)), torchs((3, 8))):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            module(torch.randn(4, 8, 3))


@pytest.mark.parametrize(("ours", "torchs"), BOTH)
def test_copies_compile_and_autocast(ours: Any, torchs: Any) -> None:
    torch._dynamo.reset()
    norm = randomised(ours((3, 8)))
    x = law.randn(2, 3, 8).requires_grad_()
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), ours.from_torch(norm)):
        assert type(twin) is ours and torch.equal(twin(x), norm(x))
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, norm)))
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert norm(x.to(dtype)).dtype == torchs((3, 8))(x.to(dtype)).dtype
