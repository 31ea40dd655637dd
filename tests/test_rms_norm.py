"""fastattn.rms_norm on every backend and instruction set, held to the law; and where each rounding happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import each
import law
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.ops.rms_norm import reference, rms_norm
from fastattn.ops.rms_norm.op import rms_norm_fwd
from fastattn.runtime import launch

ROUNDINGS = ("llama", "last", "gemma")


@pytest.fixture(params=each.WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with each.placed(request.param):
        yield request.param


def tensors(*shape: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    weight = law.randn(shape[-1], dtype=weight_dtype or dtype, seed=2)
    return {"x": law.randn(*shape, dtype=dtype, seed=1), "weight": weight}


def holds(way: str, given: dict[str, torch.Tensor], options: dict[str, Any] | None = None) -> None:
    with each.way(way):
        got = law.check(rms_norm, reference.rms_norm, given, options, wants=tuple(given), names=("y", "sum"))
        with torch.no_grad():  # the short road gives the same bits
            y = rms_norm(**given, **(options or {}))
    assert torch.equal(y[0] if isinstance(y, tuple) else y, got["y"])


@pytest.mark.parametrize(
    "shape", [(3, 1), (5, 7), (2, 3, 64), (9, 768), (6, 1000), (5, 4096), (3, 5000), (2, 33000), (2, 262144)]
)
@pytest.mark.parametrize("dtype", law.LOW)
def test_shapes(way, shape, dtype):
    if way in ("triton", "cuda") and launch.INTERPRETED and shape[-1] > 100000:
        pytest.skip("33000 columns take the same road, and the interpreter and the emulator less time")
    holds(way, tensors(*shape, dtype=dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", law.LOW)
def test_roundings(way, rounding, dtype):
    for weight_dtype in {dtype, torch.float32}:
        given = tensors(7, 130, dtype=dtype, weight_dtype=weight_dtype)
        holds(way, given, {"rounding": rounding})
        holds(way, {**given, "residual": law.randn(7, 130, dtype=dtype, seed=4)}, {"rounding": rounding})
        holds(way, {"x": given["x"]}, {"rounding": rounding})
    if rounding != "gemma":
        holds(way, tensors(7, 130, dtype=dtype), {"rounding": rounding, "weight_offset": 0.75})


def _llama(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def _gemma(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).type_as(x)


def _last(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * h).to(x.dtype)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_of_the_models(way, rounding, dtype):
    """The models' own code gives the same bits, except where its sum in another order moves a value across a tie."""
    given = tensors(64, 1024, dtype=dtype)
    model = {"llama": _llama, "gemma": _gemma, "last": _last}
    with each.way(way):
        y = rms_norm(**given, rounding=rounding)
    same = {name: (each.bits(f(**given, eps=1e-6)) == each.bits(y)).float().mean() for name, f in model.items()}
    assert same[rounding] > 0.999
    assert all(share < 0.95 for name, share in same.items() if name != rounding)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "permuted", "expanded"])
@pytest.mark.parametrize("dtype", law.LOW)
def test_strides(way, dtype, layout):
    x, residual = (each.row_views(6, 40, dtype)[layout] for _ in range(2))
    holds(way, {**tensors(1, 40, dtype=dtype), "x": x, "residual": residual})


@pytest.mark.parametrize("dtype", law.LOW)
def test_residual_is_returned_exactly(way, dtype):
    given = {**tensors(5, 77, dtype=dtype), "residual": law.randn(5, 77, dtype=dtype, seed=4)}
    given["x"][0], given["residual"][0] = torch.tensor(1e-40).to(dtype), 0  # denormals come back as they are
    with each.way(way), torch.no_grad():
        y, total = rms_norm(**given)
        assert torch.equal(each.bits(total), each.bits(given["x"] + given["residual"]))
        assert torch.equal(y, rms_norm(total, given["weight"]))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
def test_empty(way, shape):
    given = {name: t.requires_grad_() for name, t in tensors(*shape, dtype=torch.float32).items()}
    with each.way(way):
        y = rms_norm(**given)
        y.sum().backward()
    assert y.shape == shape and given["x"].grad.shape == shape and not given["weight"].grad.any()


def test_zero_rows_and_bad_rows(way):
    for dtype in law.LOW:
        x = torch.randn(4, 70).to(dtype)
        clean = x.clone()
        x[0], x[2, 3] = 0, float("nan")
        with each.way(way):
            y, expected = rms_norm(x), rms_norm(clean)
        assert not y[0].any() and y[2].isnan().all() and torch.equal(y[[1, 3]], expected[[1, 3]])


def test_matches_torch(way):
    given = tensors(33, 768, dtype=torch.float32)
    with each.way(way):
        y = rms_norm(**given, eps=1e-5, rounding="last")
    torch.testing.assert_close(y, F.rms_norm(given["x"], (768,), given["weight"], 1e-5), atol=3e-6, rtol=0)


def test_gradcheck():
    x, weight, residual = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((3, 9), 9, (3, 9)))
    for rounding in ROUNDINGS:
        call = lambda x, w, r, rounding=rounding: rms_norm(x, w, residual=r, rounding=rounding)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, weight, residual))


@pytest.mark.parametrize("dtype", law.LOW)
def test_bits_do_not_depend_on_threads(dtype):
    given = {name: t.requires_grad_() for name, t in tensors(513, 600, dtype=dtype).items()}
    dy = torch.randn(513, 600).to(dtype)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y = rms_norm(**given)
        found.append([each.bits(t) for t in (y, *torch.autograd.grad(y, list(given.values()), dy))])
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(found[0], run, strict=True))


def test_bad_input():
    x, weight = torch.randn(3, 8), torch.randn(8)
    for options, sentence in (
        ({"rounding": "first"}, "rms_norm: rounding must be one of 'llama', 'last', 'gemma', got 'first'"),
        ({"rounding": None}, "rounding must be one of"),
        ({"rounding": "gemma", "weight_offset": 1.0}, "weight_offset must be 0 with rounding='gemma'"),
        ({"weight_offset": float("nan")}, "weight_offset must be finite"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"eps": None}, "eps must be a number, got NoneType"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rms_norm(x, weight, **options)
    with pytest.raises(ValueError, match="weight_offset must be 0 without weight"):
        rms_norm(x, weight_offset=1.0)
    with pytest.raises(ValueError, match=r"weight must be a torch\.Tensor, got list"):
        rms_norm(x, [1.0] * 8)


def test_integer_eps_and_offset_are_numbers():
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, eps=0, weight_offset=1), rms_norm(x, weight, eps=0.0, weight_offset=1.0))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_opcheck(rounding):
    x, weight, residual = (torch.randn(n, requires_grad=True) for n in ((4, 6, 40), 40, (4, 6, 40)))
    fwd, bwd = torch.ops.fastattn.rms_norm_fwd.default, torch.ops.fastattn.rms_norm_bwd.default
    torch.library.opcheck(fwd, (x, weight, residual, 1e-6, 0.0, rounding, None))
    torch.library.opcheck(fwd, (x, None, None, 1e-6, 0.0, rounding, None))
    rstd = rms_norm_fwd(x, weight, None, 1e-6, 0.0, rounding, None)[2].detach()
    d = residual.detach()
    torch.library.opcheck(bwd, (d, d, x.detach(), weight.detach(), rstd, 1e-6, 0.0, rounding, True, None))
    torch.library.opcheck(bwd, (d, None, x.detach(), None, rstd, 1e-6, 0.0, rounding, False, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def block(x, weight, residual):
        y, total = rms_norm(x, weight, residual=residual, rounding="gemma")
        return (y * total).sum() + rms_norm(total).square().sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        given = [torch.randn(n, requires_grad=True) for n in ((rows, 24), 24, (rows, 24))]
        expected = torch.autograd.grad(block(*given), given)
        for a, b in zip(expected, torch.autograd.grad(compiled(*given), given), strict=True):
            torch.testing.assert_close(a, b)


def test_use_backend_reaches_compiled_code(monkeypatch):
    """A trace cannot read the scope; the op reads it when it runs."""
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    expected = compiled(x)
    calls = []
    monkeypatch.setattr(reference, "forward", lambda *a, f=reference.forward: calls.append(1) or f(*a))
    with fastattn.use_backend("reference"):
        torch.testing.assert_close(compiled(x), expected)
    assert calls


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(16, 300),
    dtype=st.sampled_from(law.LOW),
    wide_weight=st.booleans(),
    residual=st.booleans(),
    rounding=st.sampled_from(ROUNDINGS),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    eps=st.sampled_from([1e-12, 1e-6, 0.1]),
    isa=st.sampled_from(each.ISAS or ("baseline",)),
    seed=st.integers(0, 1000),
)
def test_fuzz(rows, cols, dtype, wide_weight, residual, rounding, scale, eps, isa, seed):
    given = tensors(rows, cols, dtype=dtype, weight_dtype=torch.float32 if wide_weight else dtype)
    given["x"] = (law.randn(rows, cols, seed=seed) * scale).to(dtype)
    if residual:
        given["residual"] = law.randn(rows, cols, dtype=dtype, seed=seed + 1)
    holds(f"cpu-{isa}", given, {"eps": eps, "rounding": rounding})
