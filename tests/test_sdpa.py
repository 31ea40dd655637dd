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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db

import fastattn
from fastattn import sdpa
from fastattn.ops import _eager
from fastattn.ops.attention import backends
from fastattn.runtime import native
from fastattn.sdpa import _cuda_flash, _cuda_fused

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


def qkv(
    seqlen_q: int = 33,
    seqlen_k: int = 33,
    nheads_k: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str = "bhsd",
) -> dict[str, torch.Tensor]:
    """q, k, v in torch's layout; bshd: views of memory in ours."""
    found = {}
    for i, (name, seqlen, heads) in enumerate(
        (("q", seqlen_q, 4), ("k", seqlen_k, nheads_k), ("v", seqlen_k, nheads_k))
    ):
        t = law.randn(2, heads, seqlen, 16, dtype=dtype, seed=i)
        found[name] = t.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bshd" else t
    return found


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


# ---- the CUDA operators: their glue runs here on CPU tensors; the kernels behind it need a GPU


class Torchs:
    """Stands for torch's kernel: a call that reaches it was not taken."""

    def call_boxed(self, keys: Any, *args: Any, **kwargs: Any) -> str:
        return "torch"


def cuda_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, ...]:
    return _cuda_flash._forward(Torchs(), None, q, k, v, 0.0, causal)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("nheads_k", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_glue_of_dense_calls(layout: str, nheads_k: int, causal: bool) -> None:
    """Causal is bottom right here. Numbers against the reference; shapes and strides against torch's meta functions."""
    q, k, v = qkv(7, 9, nheads_k, torch.bfloat16, layout).values()
    outputs = cuda_forward(q, k, v, causal)
    do = torch.randn_like(outputs[0])
    gradients = _cuda_flash._backward(
        Torchs(), None, do, q, k, v, *outputs[:2], None, None, 7, 9, 0.0, causal, outputs[6], outputs[7]
    )
    leaves = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    o, lse = fastattn.reference.attention(*leaves, causal=causal, return_lse=True)
    expected = torch.autograd.grad(o, leaves, do.transpose(1, 2))
    torch.testing.assert_close(outputs[0], o.transpose(1, 2), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(outputs[1], lse, rtol=2e-2, atol=2e-2)
    for got, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, reference.transpose(1, 2), rtol=3e-2, atol=3e-2)
    meta = [t.to("meta") for t in (q, k, v)]
    if layout == "bshd":
        meta = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in meta]
    fake = aten._scaled_dot_product_flash_attention(*meta, 0.0, causal)
    for i in (0, 1):
        assert (outputs[i].shape, outputs[i].stride(), outputs[i].dtype) == (
            fake[i].shape,
            fake[i].stride(),
            fake[i].dtype,
        )
    assert outputs[2:6] == fake[2:6] == (None, None, 7, 9)
    for i in (6, 7, 8):
        assert (outputs[i].shape, outputs[i].dtype) == (fake[i].shape, fake[i].dtype)
    fake_gradients = aten._scaled_dot_product_flash_attention_backward(
        fake[0], *meta, *fake[:2], None, None, 7, 9, 0.0, causal, fake[6], fake[7]
    )
    for got, f in zip(gradients, fake_gradients, strict=True):
        assert (got.shape, got.stride()) == (f.shape, f.stride())


def test_cuda_glue_of_packed_calls_and_windows() -> None:
    q, k, v = (law.randn(20, 4, 16, dtype=torch.bfloat16, seed=i) for i in range(3))
    cu = torch.tensor([0, 6, 20], dtype=torch.int32)
    options: dict[str, Any] = {"window_size_left": 4, "window_size_right": -1}
    found = _cuda_flash._flash_forward(Torchs(), None, q, k, v, cu, cu, 14, 14, 0.0, True, False, **options)
    o, lse = fastattn.attention(q, k, v, causal=True, window=(4, None), cu_seqlens_q=cu, return_lse=True)
    assert torch.equal(found[0], o) and torch.equal(found[1], lse)
    out = torch.empty_like(q)
    inplace = _cuda_flash._flash_inplace(Torchs(), None, out, q, k, v, cu, cu, 14, 14, 0.0, True, False, **options)
    assert torch.equal(out, o) and torch.equal(inplace, lse)
    do = torch.randn_like(o)
    got = _cuda_flash._flash_backward(
        Torchs(), None, do, q, k, v, *found[:2], cu, cu, 14, 14, 0.0, True, found[2], found[3], **options
    )
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(
        fastattn.attention(*leaves, causal=True, window=(4, None), cu_seqlens_q=cu), leaves, do
    )
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_cuda_glue_carries_dropouts_seed_to_the_backward() -> None:
    q, k, v = qkv(9, 9, dtype=torch.bfloat16).values()
    outputs = _cuda_flash._forward(Torchs(), None, q, k, v, 0.3, False)
    do = torch.randn_like(outputs[0])
    rest = (*outputs[:2], None, None, 9, 9, 0.3, False, outputs[6], outputs[7])
    got = _cuda_flash._backward(Torchs(), None, do, q, k, v, *rest)
    leaves = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    arguments = (None,) * 6 + (outputs[6].view(torch.int64), None, None, None, None, False, None, None, 0.3, None, None)
    o, _ = fastattn.ops.attention.op.attention_fwd(*leaves, *arguments)
    assert torch.equal(outputs[0], o.transpose(1, 2))
    expected = torch.autograd.grad(o, leaves, do.transpose(1, 2))
    assert all(torch.equal(g, e.transpose(1, 2)) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "option",
    [
        {"seqused_k": torch.tensor([3, 4], dtype=torch.int32)},
        {"alibi_slopes": torch.ones(4)},
        {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
        {"num_splits": 2},
    ],
    ids=lambda option: next(iter(option)),
)
def test_cuda_options_that_only_torchs_kernel_has(option: dict[str, Any]) -> None:
    q, k, v = (t.transpose(1, 2) for t in qkv(9, 9, dtype=torch.bfloat16).values())
    arguments = (None, None, 9, 9, 0.0, False, False)
    assert _cuda_flash._flash_forward(Torchs(), None, q, k, v, *arguments, **option) == "torch"
    assert _cuda_flash._flash_inplace(Torchs(), None, q, q, k, v, *arguments, **option) == "torch"
    assert _cuda_flash._forward(Torchs(), None, q, k, v, 0.0, False, True) == "torch"


BIASES = {
    "none": None,
    "padding": torch.zeros(2, 1, 1, 9).masked_fill_(torch.arange(9) >= torch.tensor([6, 9])[:, None, None, None], -1e9),
    "pairs": torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(3)),
}


def like_meta(found: Any, fake: Any) -> None:
    """Shape, strides and dtype are what compiled code was promised."""
    for got, promised in zip(found, fake, strict=True):
        if not isinstance(promised, torch.Tensor):
            assert got == promised
        else:
            assert (got.shape, got.stride(), got.dtype) == (promised.shape, promised.stride(), promised.dtype)


def on_meta(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors
    ]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("op", ["efficient", "cudnn"])
def test_cuda_glue_of_the_operators_with_a_bias(op: str, bias: str, causal: bool, layout: str) -> None:
    """Causal is upper left here. Numbers against the reference; shapes and strides against torch's meta functions."""
    q, k, v = qkv(7, 9, 4 if op == "efficient" else 2, torch.bfloat16, layout).values()
    given = BIASES[bias]
    expanded = None if given is None else given.bfloat16().expand(2, 4, 7, 9)
    options = (0.0, causal)
    do = torch.randn_like(q)
    if op == "efficient":
        found = _cuda_fused._efficient_forward(Torchs(), None, q, k, v, expanded, True, *options)
        o, lse = found[0], found[1][..., :7]
        assert found[1].shape == (2, 4, 32) and found[1][..., 7:].eq(float("inf")).all()
        rest = (*found[:2], *found[2:4], 0.0, [True] * 4, causal)
        gradients = _cuda_fused._efficient_backward(Torchs(), None, do, q, k, v, expanded, *rest)
    else:
        found = _cuda_fused._cudnn_forward(Torchs(), None, q, k, v, expanded, True, *options)
        o, lse = found[0], found[1].squeeze(-1)
        rest = (*found[:2], *found[6:8], expanded, None, None, 7, 9, *options)
        gradients = _cuda_fused._cudnn_backward(Torchs(), None, do, q, k, v, *rest)
    leaves = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    pairs = None if expanded is None else expanded.clone().requires_grad_()
    reference = fastattn.reference.attention(
        *leaves, bias=pairs, causal="upper_left" if causal else False, return_lse=True
    )
    wanted = leaves if pairs is None or op == "cudnn" else [*leaves, pairs]
    expected = torch.autograd.grad(reference[0], wanted, do.transpose(1, 2))
    torch.testing.assert_close(o, reference[0].transpose(1, 2), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, reference[1], rtol=2e-2, atol=2e-2)
    for got, gradient in zip(gradients[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, gradient.transpose(1, 2), rtol=3e-2, atol=3e-2)
    if len(wanted) == 4:
        torch.testing.assert_close(gradients[3], expected[3], rtol=3e-2, atol=3e-2)
    meta, (meta_bias,) = on_meta(q, k, v), on_meta(expanded)
    if op == "efficient":
        fake = aten._scaled_dot_product_efficient_attention(*meta, meta_bias, True, *options)
        like_meta(found, fake)
        short = _cuda_fused._efficient_forward(Torchs(), None, q, k, v, expanded, False, *options)
        like_meta(short, aten._scaled_dot_product_efficient_attention(*meta, meta_bias, False, *options))
        arguments = (*fake, 0.0, [True, True, True, pairs is not None], causal)
        promised = aten._scaled_dot_product_efficient_attention_backward(fake[0], *meta, meta_bias, *arguments)
    else:
        fake = aten._scaled_dot_product_cudnn_attention(*meta, meta_bias, True, *options)
        like_meta(found, fake)
        arguments = (*fake[:2], *fake[6:8], meta_bias, None, None, 7, 9, *options)
        promised = aten._scaled_dot_product_cudnn_attention_backward(fake[0], *meta, *arguments)
    like_meta(gradients, promised)


def test_cuda_glue_without_a_logsumexp() -> None:
    """torch asks for none when q, k and v want no gradient; a bias may want one all the same."""
    q, k, v = qkv(7, 9, dtype=torch.bfloat16).values()
    bias, do = BIASES["pairs"].bfloat16(), torch.randn_like(q)
    found = []
    for wanted in (True, False):
        o, lse, seed, offset = _cuda_fused._efficient_forward(Torchs(), None, q, k, v, bias, wanted)
        rest = (o, lse, seed, offset, 0.0, [True] * 4)
        found.append(_cuda_fused._efficient_backward(Torchs(), None, do, q, k, v, bias, *rest))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_cuda_glue_of_headdims_that_differ() -> None:
    q, k, _ = qkv(7, 9, dtype=torch.bfloat16).values()
    v = law.randn(2, 4, 9, 24, dtype=torch.bfloat16, seed=5)
    expected = fastattn.reference.attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    efficient = _cuda_fused._efficient_forward(Torchs(), None, q, k, v, None, False)
    like_meta(efficient, aten._scaled_dot_product_efficient_attention(*on_meta(q, k, v), None, False))
    cudnn = _cuda_fused._cudnn_forward(Torchs(), None, q, k, v, None, False)
    like_meta(cudnn, aten._scaled_dot_product_cudnn_attention(*on_meta(q, k, v), None, False))
    for found in (efficient[0], cudnn[0]):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", ["efficient", "cudnn"])
def test_cuda_glue_with_a_bias_drops_the_same_pairs_backward(op: str) -> None:
    """v and do are the identity: the output is the matrix of probabilities, and dv its transpose."""
    q, k, _ = qkv(16, 16, dtype=torch.bfloat16).values()
    eye = torch.eye(16, dtype=torch.bfloat16).expand(2, 4, 16, 16).clone()
    if op == "efficient":
        o, lse, seed, offset = _cuda_fused._efficient_forward(Torchs(), None, q, k, eye, None, True, 0.5)
        rest = (o, lse, seed, offset, 0.5, [True, True, True, False])
        dv = _cuda_fused._efficient_backward(Torchs(), None, eye, q, k, eye, None, *rest)[2]
    else:
        o, lse, *_, seed, offset, _ = _cuda_fused._cudnn_forward(Torchs(), None, q, k, eye, None, True, 0.5)
        rest = (o, lse, seed, offset, None, None, None, 16, 16, 0.5, False)
        dv = _cuda_fused._cudnn_backward(Torchs(), None, eye, q, k, eye, *rest)[2]
    assert seed.storage_offset() == offset.storage_offset() == 0  # compiled code wants aligned outputs
    assert 0.3 < (o == 0).float().mean() < 0.7 and torch.equal(o == 0, dv.mT == 0)


def test_cuda_calls_that_only_torchs_other_kernels_take() -> None:
    q, k, v = qkv(9, 9, dtype=torch.bfloat16).values()
    assert _cuda_fused._cudnn_forward(Torchs(), None, q, k, v, None, True, 0.0, False, True) == "torch"  # debug mask
    wide = [t.double() for t in (q, k, v)]
    lse, seed = torch.empty(2, 4, 9), torch.empty((), dtype=torch.int64)
    assert _cuda_fused._cudnn_forward(Torchs(), None, *wide, None, True) == "torch"
    assert _cuda_fused._efficient_forward(Torchs(), None, *wide, None, True) == "torch"
    rest = (wide[0], lse, seed, seed)
    assert _cuda_fused._efficient_backward(Torchs(), None, wide[0], *wide, None, *rest, 0.0, [True] * 4) == "torch"
    rest = (*rest, None, None, None, 9, 9, 0.0, False)
    assert _cuda_fused._cudnn_backward(Torchs(), None, wide[0], *wide, *rest) == "torch"
