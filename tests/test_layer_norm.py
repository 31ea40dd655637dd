"""fastattn.layer_norm on every backend and instruction set, held to the law; and the machinery around it."""

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
from fastattn.ops.layer_norm import layer_norm, reference
from fastattn.ops.layer_norm.op import layer_norm_fwd
from fastattn.runtime import launch

ALL = ("x", "weight", "bias")


@pytest.fixture(params=each.WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with each.placed(request.param):
        yield request.param


def tensors(*shape: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    weight_dtype = weight_dtype or dtype
    return {
        "x": law.randn(*shape, dtype=dtype, seed=1),
        "weight": law.randn(shape[-1], dtype=weight_dtype, seed=2),
        "bias": law.randn(shape[-1], dtype=weight_dtype, seed=3),
    }


def holds(way: str, given: dict[str, torch.Tensor], options: dict[str, Any] | None = None, wants=ALL) -> None:
    names = ("y", "sum")
    with each.way(way):
        got = law.check(layer_norm, reference.layer_norm, given, options, wants=wants, names=names)
        with torch.no_grad():  # the short road gives the same bits
            y = layer_norm(**given, **(options or {}))
    assert torch.equal(y[0] if isinstance(y, tuple) else y, got["y"])


# 1: one column; 7: less than a vector; 64, 768, 4096: whole packs; 1000, 5000: tails; 262144: many chunks, two rows.
@pytest.mark.parametrize(
    "shape", [(3, 1), (5, 7), (2, 3, 64), (9, 768), (6, 1000), (5, 4096), (3, 5000), (2, 33000), (2, 262144)]
)
@pytest.mark.parametrize("dtype", law.LOW)
def test_shapes(way, shape, dtype):
    if way in ("triton", "cuda") and launch.INTERPRETED and shape[-1] > 100000:
        pytest.skip("33000 columns take the same road, and the interpreter and the emulator less time")
    holds(way, tensors(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", law.LOW)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 257])
def test_row_counts(way, rows, dtype):
    holds(way, tensors(rows, 40, dtype=dtype))


@pytest.mark.parametrize("dtype", law.LOW)
@pytest.mark.parametrize("given_names", [(), ("weight",), ("bias",)])
def test_absent_weight_and_bias(way, dtype, given_names):
    all_tensors = tensors(7, 100, dtype=dtype)
    chosen = {name: all_tensors[name] for name in ("x", *given_names)}
    holds(way, chosen, wants=tuple(chosen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weight_with_16_bit_rows(way, dtype):
    holds(way, tensors(9, 333, dtype=dtype, weight_dtype=torch.float32))


@pytest.mark.parametrize("dtype", law.LOW)
def test_residual(way, dtype):
    given = {**tensors(2, 5, 200, dtype=dtype), "residual": law.randn(2, 5, 200, dtype=dtype, seed=4)}
    holds(way, given, wants=(*ALL, "residual"))
    with each.way(way):
        y, total = layer_norm(**given)
        assert torch.equal(y, layer_norm(total, given["weight"], given["bias"]))
    assert torch.equal(total, given["x"] + given["residual"])


def test_only_the_sum_used(way):
    x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, requires_grad=True)
    with each.way(way):
        _, total = layer_norm(x, weight, residual=residual)
        total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, torch.ones_like(x))
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("dtype", law.LOW)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "permuted", "expanded"])
def test_strides(way, dtype, layout):
    x, residual = (each.row_views(6, 40, dtype)[layout] for _ in range(2))
    given = {**tensors(1, 40, dtype=dtype), "x": x, "residual": residual}
    holds(way, given, wants=(*ALL, "residual"))
    with each.way(way):
        assert layer_norm(x).is_contiguous()


@pytest.mark.parametrize("dtype", law.LOW)
def test_rows_that_lose_digits(way, dtype):
    """Constant rows, means large against the deviation, one huge element: where one-pass statistics would fail."""
    x = torch.randn(6, 1024)
    x[0] = 1000.0
    x[1] = 1000 + x[1]
    x[2] = 8 + x[2]
    x[3, 0] = 6e4
    x[4] = 0
    x[5] *= 1e-4
    holds(way, {**tensors(1, 1024, dtype=dtype), "x": x.to(dtype)})
    with each.way(way):
        y = layer_norm(x.to(dtype))
    assert not y[0].any() and not y[4].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_row_spoils_no_other(way, value):
    for dtype in law.LOW:
        x = torch.randn(4, 70).to(dtype)
        clean = x.clone()
        x[1, 69] = value
        with each.way(way):
            y, expected = layer_norm(x), layer_norm(clean)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
def test_empty(way, shape):
    given = {name: t.requires_grad_() for name, t in tensors(*shape, dtype=torch.float32).items()}
    with each.way(way):
        y = layer_norm(**given)
        y.sum().backward()
    assert y.shape == shape and given["x"].grad.shape == shape
    assert not given["weight"].grad.any() and not given["bias"].grad.any()


def test_matches_torch_closely(way):
    for dtype, atol in ((torch.float32, 3e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        given = tensors(33, 768, dtype=dtype)
        with each.way(way):
            y = layer_norm(**given)
        torch.testing.assert_close(
            y, F.layer_norm(given["x"], (768,), given["weight"], given["bias"]), atol=atol, rtol=0
        )


def test_float64_is_served_by_the_reference():
    x, weight, bias, residual = (
        torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((3, 9), 9, 9, (3, 9))
    )
    assert fastattn.explain(layer_norm, x, weight, bias).chosen == "reference"
    call = lambda x, w, b, r: layer_norm(x, w, b, residual=r)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))


def test_no_argument_is_written(way):
    given = {**tensors(6, 64, dtype=torch.bfloat16), "residual": torch.randn(6, 64).to(torch.bfloat16)}
    before = {name: t.clone() for name, t in given.items()}
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    with each.way(way):
        y, total = layer_norm(**leaves)
        dy = torch.ones_like(y)
        torch.autograd.grad((y, total), list(leaves.values()), (dy, dy))
    assert all(torch.equal(given[name], before[name]) for name in given) and torch.equal(dy, torch.ones_like(dy))


@pytest.mark.parametrize("dtype", law.LOW)
def test_bits_do_not_depend_on_threads(dtype):
    given = {name: t.requires_grad_() for name, t in tensors(513, 600, dtype=dtype).items()}
    dy = torch.randn(513, 600).to(dtype)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y = layer_norm(**given)
        found.append([each.bits(t) for t in (y, *torch.autograd.grad(y, list(given.values()), dy))])
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(found[0], run, strict=True))


def test_around_the_cache():
    """Inputs and outputs above 24 MB take non-temporal stores, and outputs above 4 MB huge pages."""
    for dtype, rows, cols in ((torch.float32, 2100, 4096), (torch.bfloat16, 4200, 4096), (torch.float16, 9000, 1000)):
        x, weight = torch.randn(rows, cols).to(dtype), torch.randn(cols).to(dtype)
        y, total = layer_norm(x, weight, residual=x)
        pieces = [layer_norm(part, weight, residual=part) for part in x.split(300)]
        assert torch.equal(y, torch.cat([p[0] for p in pieces])) and torch.equal(
            total, torch.cat([p[1] for p in pieces])
        )


def _bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    return {
        "x not a tensor": ({"x": [1.0]}, "layer_norm: x must be a torch.Tensor, got list"),
        "scalar": ({"x": torch.tensor(1.0)}, "x must be at least one-dimensional"),
        "integers": ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x must be float32, bfloat16, float16 or float64"),
        "stride": ({"x": x.transpose(1, 2)}, "x must be a tensor with unit last stride"),
        "sparse": ({"x": torch.eye(3).to_sparse()}, "x must be a strided tensor"),
        "weight size": ({"x": x, "weight": w[:7]}, r"weight must be of shape \[cols\] of x, \(8,\), got \(7,\)"),
        "weight shape": ({"x": x, "weight": w[None]}, r"weight must be of shape \[cols\]"),
        "weight dtype": ({"x": x, "weight": w.half()}, "weight must be of the dtype of x"),
        "weight stride": ({"x": x, "weight": torch.randn(16)[::2]}, "weight must be a tensor with unit last stride"),
        "bias dtype": ({"x": x.half(), "weight": w, "bias": w.half()}, "bias must be of the dtype of weight"),
        "residual shape": ({"x": x, "residual": x[0]}, "residual must be of shape that of x"),
        "residual dtype": ({"x": x, "residual": x.half()}, "residual must be of the dtype of x"),
        "device": ({"x": x, "weight": w.to("meta")}, "weight must be on the device of x"),
        "negative eps": ({"x": x, "eps": -1e-5}, "eps must be at least 0"),
        "nan eps": ({"x": x, "eps": float("nan")}, "eps must be finite"),
        "eps": ({"x": x, "eps": "small"}, "eps must be a number, got str"),
    }


@pytest.mark.parametrize("name", _bad_calls())
def test_bad_input(name):
    given, sentence = _bad_calls()[name]
    with pytest.raises(ValueError, match=sentence):
        layer_norm(**given)


def test_a_forced_backend_that_cannot():
    for backend in ("cpu", "cuda", "triton"):
        with fastattn.use_backend(backend), pytest.raises(fastattn.UnsupportedError, match="dtype float64"):
            layer_norm(torch.randn(2, 8, dtype=torch.float64))


def test_explain():
    found = fastattn.explain(layer_norm, torch.randn(2, 8), residual=torch.randn(2, 8))
    assert found.chosen == "cpu" and "float32 [2, 8] on cpu, no weight, residual" in str(found)


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    x, weight, bias, other = (torch.randn(n, requires_grad=True) for n in ((4, 6, 40), 40, 40, (4, 6, 40)))
    arguments = (x, weight, bias, other if residual else None, 1e-5, None)
    torch.library.opcheck(torch.ops.fastattn.layer_norm_fwd.default, arguments)
    torch.library.opcheck(torch.ops.fastattn.layer_norm_fwd.default, (x, None, None, None, 1e-5, "reference"))
    statistics = layer_norm_fwd(x, weight, bias, None, 1e-5, None)[2:]
    dx = other.detach()
    backward = (dx, dx if residual else None, *(t.detach() for t in (x, weight, bias, *statistics)))
    torch.library.opcheck(torch.ops.fastattn.layer_norm_bwd.default, (*backward, 1e-5, True, not residual, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def block(x, weight, bias, residual):
        y, total = layer_norm(x, weight, bias, residual=residual)
        return (y * total).sum() + layer_norm(total).square().sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        given = [torch.randn(n, requires_grad=True) for n in ((rows, 24), 24, 24, (rows, 24))]
        expected = torch.autograd.grad(block(*given), given)
        found = torch.autograd.grad(compiled(*given), given)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)


def test_a_compiled_call_gives_the_same_sentence():
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"layer_norm: weight must be of shape \[cols\] of x"):
        compiled(torch.randn(3, 8), torch.randn(7))


def test_export_vmap_checkpoint_autocast_flops():
    x, weight = torch.randn(5, 3, 16), torch.randn(16)

    class Module(torch.nn.Module):
        def forward(self, x):
            return layer_norm(x, weight)

    exported = torch.export.export(Module(), (x,))
    assert any("fastattn.layer_norm_fwd" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), layer_norm(x, weight))
    assert torch.equal(torch.func.vmap(lambda row: layer_norm(row, weight))(x), layer_norm(x, weight))
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(layer_norm, leaf, weight, use_reentrant=False).sum().backward()
    assert torch.equal(leaf.grad, torch.autograd.grad(layer_norm(leaf, weight).sum(), leaf)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_norm(x, weight).dtype == torch.float32
        assert layer_norm(x.bfloat16(), weight).dtype == torch.bfloat16
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert torch.equal(layer_norm(x, weight), exported.module()(x))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(16, 300),
    dtype=st.sampled_from(law.LOW),
    wide_weight=st.booleans(),
    residual=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    shift=st.sampled_from([0.0, 0.5, 20.0]),
    eps=st.sampled_from([1e-12, 1e-5, 0.1]),
    isa=st.sampled_from(each.ISAS or ("baseline",)),
    seed=st.integers(0, 1000),
)
def test_fuzz(rows, cols, dtype, wide_weight, residual, scale, shift, eps, isa, seed):
    weight_dtype = torch.float32 if wide_weight else dtype
    given = tensors(rows, cols, dtype=dtype, weight_dtype=weight_dtype)
    given["x"] = (law.randn(rows, cols, seed=seed) * scale + shift).to(dtype)
    if residual:
        given["residual"] = law.randn(rows, cols, dtype=dtype, seed=seed + 1)
    holds(f"cpu-{isa}", given, {"eps": eps}, wants=tuple(given))
