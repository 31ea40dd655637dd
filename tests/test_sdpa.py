"""fastattn.sdpa: torch's scaled_dot_product_attention through torch's hook, held to the law and to torch's own samples."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import law
import pytest
import torch
import torch.nn.functional as F
from sdpa_calls import qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db

import fastattn
from fastattn import sdpa
from fastattn.ops import _eager
from fastattn.ops.attention import backends
from fastattn.runtime import native

aten = torch.ops.aten
SDPA = F.scaled_dot_product_attention
LOW = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="torch has no hook"),
    pytest.mark.skipif(native.error() is not None, reason=str(native.error())),
]


@pytest.fixture(autouse=True)
def hook() -> Iterator[None]:
    """On for every test, and off again whatever the test did."""
    sdpa.enable()
    yield
    sdpa.disable()
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our kernels' calls, in order."""
    calls: list[str] = []

    def count(owner: Any, function: str, name: str) -> None:
        real = getattr(owner, function)

        def call(*args: Any) -> Any:
            found = real(*args)
            if function != "attention_eager" or found is not None:  # the short road may refuse
                calls.append(name)
            return found

        monkeypatch.setattr(owner, function, call)

    for function in ("forward", "backward"):
        count(backends.BACKENDS[0].impl, function, function)
    count(_eager.door, "attention_eager", "forward")
    return calls


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return SDPA(q, k, v, **options)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch's math kernel."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            options = {**options, "attn_mask": mask.to(q.dtype)}
        return SDPA(q, k, v, **options)


MASKS = {
    "none": None,
    "bool": torch.rand(2, 4, 33, 33, generator=torch.Generator().manual_seed(1)) < 0.7,
    "padding": (torch.arange(33) < torch.tensor([[20], [33]]))[:, None, None],
    "float": torch.randn(33, 33, generator=torch.Generator().manual_seed(2)),
    "causal": None,
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_law(dtype: torch.dtype, layout: str, mask: str, served: list[str]) -> None:
    options = {"attn_mask": MASKS[mask], "is_causal": mask == "causal"}
    tensors = qkv(dtype=dtype, layout=layout)
    law.check(call, plain, tensors, options, wants=tuple(tensors), names=("o",))
    assert served[:2] == ["forward", "backward"]


@pytest.mark.parametrize("nheads_k", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_arrive_unrepeated(nheads_k: int, causal: bool, served: list[str]) -> None:
    tensors = qkv(17, 40, nheads_k)
    options = {"enable_gqa": True, "is_causal": causal}
    law.check(call, plain, tensors, options, wants=tuple(tensors), names=("o",))
    assert served[:2] == ["forward", "backward"]


@pytest.mark.parametrize("nheads_k", [2, 4])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", LOW)
def test_strides_are_those_of_the_meta_functions(dtype: torch.dtype, layout: str, nheads_k: int) -> None:
    """Inductor trusts them."""
    q, k, v = qkv(7, 9, nheads_k, dtype, layout).values()
    forward, backward = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    out, lse = forward(q, k, v)
    gradients = backward(torch.randn_like(out), q, k, v, out, lse, 0.0, False)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(t) for t in (q, k, v))
        expected = forward(q, k, v)
        expected += backward(torch.empty_like(expected[0]), q, k, v, *expected, 0.0, False)
    for got, fake in zip((out, lse, *gradients), expected, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (fake.shape, fake.stride(), fake.dtype)


def layer(x: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    q, k, v = (x * 2).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    return SDPA(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(-2).sin()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", ["causal", "padding"])
def test_compiled(compiler: str, mask: str, served: list[str]) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 33, 192, requires_grad=True)
    arguments = MASKS[mask], mask == "causal"
    expected = layer(x, *arguments)
    expected_dx = torch.autograd.grad(expected.sum(), x)
    served.clear()
    got = torch.compile(layer, backend=compiler, fullgraph=True)(x, *arguments)
    dx = torch.autograd.grad(got.sum(), x)
    assert served == ["forward", "backward"]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(dx, expected_dx)


def test_compiled_code_follows_the_switch(served: list[str]) -> None:
    """The graph has the aten operator; who serves it is decided when it runs."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 33, 192)
    for on in (True, False, True):
        (sdpa.enable if on else sdpa.disable)()
        served.clear()
        compiled(x, None, True)
        assert served == (["forward"] if on else [])


@pytest.mark.parametrize("forward_by", ["fastattn", "torch"])
def test_the_two_implementations_interchange_midway(forward_by: str) -> None:
    """Forward by one, backward by the other, with a row that sees no key: lse means the same to both."""
    q, k, v = (t.requires_grad_() for t in qkv().values())
    mask = MASKS["bool"].clone()
    mask[0, :, 5] = False
    expected = torch.autograd.grad(plain(q, k, v, attn_mask=mask).sum(), (q, k, v))
    if forward_by == "torch":
        sdpa.disable()
    out = SDPA(q, k, v, attn_mask=mask)
    (sdpa.enable if forward_by == "torch" else sdpa.disable)()
    got = torch.autograd.grad(out.sum(), (q, k, v))
    assert out[0, :, 5].abs().max() == 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_float64_goes_to_torchs_kernel(served: list[str]) -> None:
    """Bit for bit what torch gives: no kernel of ours takes float64, and the reference would be slower."""
    q, k, v = (t.double().requires_grad_() for t in qkv().values())
    got = SDPA(q, k, v, is_causal=True)
    got_gradients = torch.autograd.grad(got.sum(), (q, k, v))
    sdpa.disable()
    expected = SDPA(q, k, v, is_causal=True)
    assert torch.equal(got, expected)
    for g, e in zip(got_gradients, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.equal(g, e)
    assert served == []


def test_a_forced_backend_is_obeyed(served: list[str]) -> None:
    q, k, v = qkv().values()
    with fastattn.use_backend("reference"):
        got = SDPA(q, k, v)
    assert served == []
    torch.testing.assert_close(got, plain(q, k, v))
    with fastattn.use_backend("cuda"), pytest.raises(fastattn.UnsupportedError):
        SDPA(q, k, v)


def test_import_activates_nothing() -> None:
    program = (
        "import torch, fastattn, fastattn.sdpa\n"
        "assert not fastattn.sdpa.active()\n"
        "assert torch.nn.attention.current_flash_attention_impl() is None\n"
        "assert 'fastattn' not in torch.nn.attention.list_flash_attention_impls()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_enable_and_disable_are_idempotent_and_blocks_nest() -> None:
    sdpa.enable()
    assert sdpa.active()
    with sdpa.enabled(), sdpa.enabled():
        assert sdpa.active()
    assert sdpa.active()
    sdpa.disable()
    sdpa.disable()
    assert not sdpa.active()
    with sdpa.enabled():
        with sdpa.enabled():
            pass
        assert sdpa.active()
    assert not sdpa.active()
    with pytest.raises(KeyError), sdpa.enabled():
        raise KeyError
    assert not sdpa.active()


def test_restoring_is_exact(served: list[str]) -> None:
    q, k, v = qkv().values()
    sdpa.disable()
    kernel = torch._C._dispatch_dump("aten::_scaled_dot_product_flash_attention_for_cpu")
    before = SDPA(q, k, v)
    with sdpa.enabled():
        SDPA(q, k, v)
        assert torch._C._dispatch_dump("aten::_scaled_dot_product_flash_attention_for_cpu") != kernel
    assert torch._C._dispatch_dump("aten::_scaled_dot_product_flash_attention_for_cpu") == kernel
    assert served == ["forward"]
    assert torch.equal(SDPA(q, k, v), before)
    assert served == ["forward"]


def test_another_implementation_steps_aside_and_comes_back() -> None:
    sdpa.disable()
    removed: list[int] = []

    class Handle:
        def remove(self) -> None:
            removed.append(1)

    torch.nn.attention.register_flash_attention_impl("someone's", register_fn=Handle)
    try:
        torch.nn.attention.activate_flash_attention_impl("someone's")
        with sdpa.enabled():
            assert sdpa.active()
            assert removed == [1]
        assert torch.nn.attention.current_flash_attention_impl() == "someone's"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("someone's")


def test_a_torch_without_the_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa.disable()
    for name in ("register_flash_attention_impl", "current_flash_attention_impl"):
        monkeypatch.delattr(torch.nn.attention, name)
    assert not sdpa.active()
    with pytest.raises(RuntimeError, match=r"sdpa.enable: torch must have .*register_flash_attention_impl"):
        sdpa.enable()
    monkeypatch.undo()


# ---- explain


def test_explain_names_the_server(served: list[str]) -> None:
    """What it says is what happens."""
    q, k, v = qkv().values()
    trained = torch.zeros(33, 33, requires_grad=True)
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({}, "fastattn", ""),
        ({"attn_mask": MASKS["bool"]}, "fastattn", ""),
        ({"is_causal": True, "scale": 0.5}, "fastattn", ""),
        ({"dropout_p": 0.1}, "torch", "dropout_p is 0.1"),
        ({"value": v[..., :8]}, "torch", "headdims of query and value differ (16 and 8)"),
        ({"attn_mask": trained}, "torch", "attn_mask requires a gradient"),
        ({"query": q[0], "key": k[0], "value": v[0]}, "torch", "query has 3 dimensions"),
        ({"key": k.mT.contiguous().mT}, "torch", "last dimension"),
        ({"query": q.double(), "key": k.double(), "value": v.double()}, "torch", "got torch.float64"),
    ]
    for options, server, reason in cases:
        arguments = {"query": q, "key": k, "value": v, **options}
        found = sdpa.explain(**arguments)
        served.clear()
        SDPA(**arguments)
        assert found.server == server == ("fastattn" if served else "torch"), options
        assert reason in str(found) and bool(found.reasons) == (server == "torch")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "sdpa_kernel has switched flash_attention off" in str(sdpa.explain(q, k, v))
    sdpa.disable()
    assert "the hook is off" in str(sdpa.explain(q, k, v))


# ---- torch's own samples


def samples(name: str, factor: float) -> list[Any]:
    """torch's samples, times `factor`; every floating tensor wants a gradient."""
    [info] = [o for o in op_db if o.name == name]
    found = list(info.reference_inputs("cpu", torch.float32, requires_grad=False))
    assert len(found) >= 25
    return [sample.transform(functools.partial(leaf, dtype=torch.float32, factor=factor)) for sample in found]


def leaf(x: Any, dtype: torch.dtype, factor: float = 1.0) -> Any:
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return (x.detach() * factor).to(dtype).requires_grad_() if floating else x


def drops(sample: Any) -> bool:
    """Is dropout on? multi_head_attention_forward has its probability as argument 9 after the query."""
    p = sample.kwargs.get("dropout_p", sample.args[9] if len(sample.args) > 9 else 0.0)
    return p > 0 and sample.kwargs.get("training", True)


def outcome(function: Any, sample: Any) -> list[torch.Tensor]:
    """Outputs and gradients of every argument that wants one."""
    torch.manual_seed(0)  # for dropout
    outputs = function(sample.input, *sample.args, **sample.kwargs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    arguments = [sample.input, *sample.args, *sample.kwargs.values()]
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    if leaves:
        loss = sum(o.square().sum() for o in outputs)
        outputs += [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]
    return [o.detach() for o in outputs]


@pytest.mark.parametrize(
    ("name", "options"),
    [("scaled_dot_product_attention", {}), ("multi_head_attention_forward", {"need_weights": False})],
    ids=["sdpa", "mha"],
)
def test_op_samples(name: str, options: dict[str, Any], served: list[str]) -> None:
    """Four factors up to 9 make scores of thousands in the samples of MHA, where flash attention's exp(score - lse) has
    few digits left; an eighth of each factor keeps them below ten."""
    function = functools.partial(getattr(F, name), **options)
    for sample in samples(f"nn.functional.{name}", 0.125 if options else 1.0):
        mask = sample.kwargs.get("attn_mask")
        if options and mask is not None:  # a mask that wants a gradient does not come here
            mask.requires_grad_(False)
        got = outcome(function, sample)
        sdpa.disable()
        plain = outcome(function, sample)
        truth = outcome(function, sample.transform(functools.partial(leaf, dtype=torch.float64)))
        sdpa.enable()
        terms = max(
            float(t.abs().max()) for t in truth
        )  # logits of hundreds: small gradients are what large ones leave
        for i, (g, p) in enumerate(zip(got, plain, strict=True)):
            if drops(sample):  # torch's own kernel, whose random bits depend on the dtype
                torch.testing.assert_close(g, p)
            else:
                law.compare(f"{name} {sample.kwargs} [{i}]", g, p, truth[i], terms=terms)
    assert "forward" in served and "backward" in served


# ---- models that call it


def test_hugging_face_models_with_sdpa(served: list[str]) -> None:
    """Llama with padding, forward and backward; BERT in eval. One forward call per layer."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens, mask = torch.randint(1, 90, (2, 12)), (torch.arange(12) < torch.tensor([[12], [7]])).long()
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=99,
            num_key_value_heads=2,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
            **sizes,
        )
    )
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=99, attn_implementation="sdpa", **sizes)).eval()

    def outcomes() -> list[torch.Tensor]:
        found = llama(tokens, attention_mask=mask, labels=tokens)
        return [found.logits, *torch.autograd.grad(found.loss, list(llama.parameters())), bert(tokens, mask)[0]]

    got = outcomes()
    assert served.count("forward") == 4 and served.count("backward") == 2
    sdpa.disable()
    torch.testing.assert_close(got, outcomes(), rtol=1e-3, atol=1e-4)
