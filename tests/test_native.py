"""The native module as Python sees it: instruction sets, tensors with and without the exchange API, the short road."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import each
import pytest
import torch

import fastattn
from fastattn.ops import _eager
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.rms_norm import rms_norm
from fastattn.ops.rope import rope, rope_qk, tables
from fastattn.runtime import env, native

if native.error() is not None:
    pytest.skip(str(native.error()), allow_module_level=True)
module = native.module()


@pytest.fixture
def no_exchange_api() -> Iterator[None]:
    """torch as it was before it had DLPack's C exchange API."""
    module.set_exchange_api(None)
    yield
    module.set_exchange_api(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


def _run(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_instruction_sets():
    assert module.isas()[0] == "baseline" and set(module.isas()) <= set(env.ISAS)
    before = module.isa()
    for isa in module.isas():
        module.set_isa(isa)
        assert module.isa() == isa
    module.set_isa(before)
    with pytest.raises(ValueError, match="set_isa: name must be one of"):
        module.set_isa("avx9000")


def test_the_environment_chooses_the_instruction_set():
    code = "from fastattn.runtime import native; print(native.module().isa(), native.module().hugepages())"
    assert _run(code, FASTATTN_CPU_ISA="baseline", FASTATTN_HUGEPAGES="0") == "baseline False"
    code = "import fastattn"
    with pytest.raises(AssertionError, match="FASTATTN_CPU_ISA must be one of baseline, avx2"):
        _run(code, FASTATTN_CPU_ISA="sse9")


def test_the_environment_forces_a_backend():
    code = "import torch, fastattn; print(fastattn.explain(fastattn.rms_norm, torch.randn(2, 8)).chosen)"
    assert _run(code, FASTATTN_BACKEND="reference") == "reference"
    code = "import torch, fastattn; fastattn.rms_norm(torch.randn(2, 8)); print('ran')"
    with pytest.raises(AssertionError, match="cuda: device cuda, got cpu"):
        _run(code, FASTATTN_BACKEND="cuda")


def _calls() -> dict[str, object]:
    x, w = torch.randn(3, 5, 4, 64), torch.nn.Parameter(torch.randn(64))
    tables_ = tables.plain(9, 64)
    ids = torch.tensor([[8, 1, 2, 3, 0]] * 3)
    return {
        "layer_norm": lambda: layer_norm(x, w, w),
        "layer_norm residual": lambda: layer_norm(x, residual=x)[0],
        "rms_norm": lambda: rms_norm(x.transpose(1, 2), w, rounding="last"),
        "rms_norm bf16": lambda: rms_norm(x.bfloat16(), w, weight_offset=1.0),
        "rope": lambda: rope(x, *tables_, position_ids=ids),
        "rope_qk": lambda: torch.cat(rope_qk(x, x[:, :, :2], *tables_, interleaved=True), 2),
    }


@pytest.mark.parametrize("name", _calls())
def test_without_the_exchange_api(name, request):
    torch.manual_seed(1)
    with torch.no_grad():
        expected = _calls()[name]()
        request.getfixturevalue("no_exchange_api")
        assert not module.has_exchange_api()
        torch.manual_seed(1)
        assert torch.equal(each.bits(_calls()[name]()), each.bits(expected))


def test_without_the_exchange_api_other_objects_are_refused(no_exchange_api):
    for wrong in ("tensor", torch.ones(3, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match="fastattn: expected a"):
            module.norm_fwd(wrong, *[None] * 7, True, 1e-5, 0.0, False, 1)


@pytest.mark.parametrize("name", _calls())
def test_the_short_road_serves_plain_calls(name, monkeypatch):
    served = []

    class Door:
        def __getattr__(self, door):
            def call(*args):
                y = getattr(module, door)(*args)
                served.append(y is not None)
                return y

            return call

    monkeypatch.setattr(_eager, "door", Door())
    call = _calls()[name]
    with torch.no_grad():
        y = call()
    assert served == [True]
    with torch.no_grad(), fastattn.use_backend("cpu"):
        assert torch.equal(each.bits(call()), each.bits(y))
    assert served == [True]  # a forced backend takes the ordinary road


def test_plain():
    x, w = torch.randn(3, 8), torch.nn.Parameter(torch.randn(8))
    assert _eager.plain(x, None) and not _eager.plain(x, w)

    class Sub(torch.Tensor):
        pass

    with torch.no_grad():
        assert _eager.plain(x, w) and not _eager.plain(x.as_subclass(Sub))
        with fastattn.use_backend("reference"):
            assert not _eager.plain(x)
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            assert not _eager.plain(x)
        assert not _eager.plain([1.0])
    assert not torch.func.vmap(lambda row: torch.tensor(_eager.plain(row)))(x).any()


def test_what_the_short_road_does_not_know():
    """It says None instead of guessing, and the ordinary road gives the result or the sentence."""
    x, door = torch.randn(3, 8), module.norm_eager
    rest = (1e-5, 0.0, "last", 1)
    assert isinstance(door(x, None, None, None, True, *rest), torch.Tensor)
    unknown = [
        (x.double(), None, None, None),
        (x.t(), None, None, None),
        (x, torch.randn(7), None, None),
        (x, torch.randn(8).half(), None, None),
        (x, torch.randn(1, 8), None, None),
        (x, torch.tensor(1.0), None, None),
        (x.half(), torch.randn(8), torch.randn(8).half(), None),
        (x, None, torch.tensor(1.0), None),
        (x, None, None, torch.randn(3, 7)),
        (x, None, None, x.half()),
        (torch.tensor(1.0), None, None, None),
        (x.to("meta"), None, None, None),
        (x.to_sparse(), None, None, None),
        (None, None, None, None),
    ]
    for tensors in unknown:
        assert door(*tensors, True, *rest) is None, tensors
    for options in (
        (1, 0.0, "last", 1),
        (1e-5, 0, "last", 1),
        (1e-5, 0.0, "gemma", 1),
        (-1.0, 0.0, "last", 1),
        (1e-5, 0.5, "last", 1),
    ):
        assert door(x, None, None, None, True, *options) is None, options


def test_what_the_short_road_back_does_not_know():
    x, statistic, door = torch.randn(3, 8), torch.ones(3), module.norm_bwd_eager
    known = (x, None, x, torch.ones(8), torch.ones(8), statistic, statistic)
    rest = (True, 0.0, True, True, 1)
    assert [t.shape for t in door(*known, *rest)] == [(3, 8), (8,), (8,)]
    for i, wrong in (
        *((0, t) for t in (None, x.half(), x[:2], x.t().contiguous().t(), x.to("meta"))),
        *((1, t) for t in (x.half(), x[:2])),
        *((2, t) for t in (None, x.double())),
        *((3, t) for t in (None, torch.ones(7), torch.ones(8).half(), torch.tensor(1.0))),
        *((4, t) for t in (None, torch.ones(8).bfloat16())),
        *((i, t) for i in (5, 6) for t in (None, torch.ones(4), torch.ones(6)[::2], statistic.half())),
    ):
        assert door(*known[:i], wrong, *known[i + 1 :], *rest) is None, (i, wrong)
    assert door(*known, False, *rest[1:]) is None  # a mean without a layer norm
    assert door(*known, True, float("nan"), *rest[2:]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (5, 40), (2, 3, 40)])
@pytest.mark.parametrize("added", [False, True])
def test_gradients_of_the_short_road_are_those_of_the_ordinary_one(dtype, shape, added):
    x, residual, dy, dsum = (torch.randn(shape, dtype=dtype) for _ in range(4))
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])

    def gradients(norm, *vectors, **options):
        leaves = [t.detach().requires_grad_() for t in ((x, residual) if added else (x,)) + vectors]
        given = {"residual": leaves[1]} if added else {}
        found = norm(leaves[0], *leaves[1 + added :], **given, **options)
        return torch.autograd.grad(found, leaves, (dy, dsum) if added else dy)

    for norm, vectors, options in (
        (layer_norm, (weight, bias), {}),
        (layer_norm, (weight,), {"eps": 0.1}),
        (rms_norm, (weight,), {"weight_offset": 0.5}),
        (rms_norm, (weight,), {"rounding": "gemma"}),
        (rms_norm, (), {}),
    ):
        short = gradients(norm, *vectors, **options)
        with fastattn.use_backend("cpu"):
            ordinary = gradients(norm, *vectors, **options)
        for ours, theirs in zip(short, ordinary, strict=True):
            assert torch.equal(ours, theirs)


def test_poisoned_outputs_are_overwritten():
    """The fixture of every test fills native outputs with NaN first."""
    y = module.empty([4, 5], 0, [5, 1])
    assert y.isnan().all()
    module.poison_outputs(False)
    with torch.no_grad():
        expected = layer_norm(torch.ones(4, 5))
        module.poison_outputs(True)
        assert torch.equal(layer_norm(torch.ones(4, 5)), expected)
