"""fastattn's attention inside torch's machinery: opcheck, compile, export, fakes, autocast, checkpoint, func, FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import attention, attention_kvcache, attention_weights, scaled_dot_product_attention
from fastattn.ops.attention import op


def qkv(
    seqlen_q: int = 7, seqlen_k: int = 9, dtype: torch.dtype = torch.float32, grad: bool = False
) -> list[torch.Tensor]:
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 8)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def forward_args(backend: str | None = None, dropout_p: float = 0.0, grad: bool = True) -> tuple[Any, ...]:
    bias = torch.randn(4, 7, 9, requires_grad=grad)
    sinks = torch.randn(4, requires_grad=grad)
    mask = torch.rand(2, 1, 7, 9) < 0.7
    philox = torch.tensor([1, 2]) if dropout_p else None
    options = (None, 2, False, None, 5.0, dropout_p, None, backend)
    return (*qkv(grad=grad), mask, bias, torch.rand(4), sinks, None, None, philox, None, None, *options)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_opcheck_forward(backend: str | None) -> None:
    torch.library.opcheck(op.attention_fwd.overload, forward_args(backend, dropout_p=0.2))


def test_opcheck_backward() -> None:
    args = forward_args(grad=False)
    o, lse = op.attention_fwd(*args)
    torch.library.opcheck(
        op.attention_bwd.overload, (torch.randn_like(o), torch.randn_like(lse), o, lse, *args, True, True)
    )


def test_opcheck_packed() -> None:
    cu = torch.tensor([0, 3, 10], dtype=torch.int32)
    q, k, v = torch.randn(10, 4, 16), torch.randn(10, 2, 16), torch.randn(10, 2, 16)
    for t in (q, k, v):
        t.requires_grad_()
    args = (q, k, v, None, None, None, None, cu, None, None, 7, 7, None, 0, False, None, None, 0.0, None, None)
    torch.library.opcheck(op.attention_fwd.overload, args)


def test_opcheck_weights_and_kvcache() -> None:
    q, k, _ = qkv(grad=True)
    lse = torch.randn(2, 4, 7, requires_grad=True)
    weights = (q, k, lse, None, torch.randn(4, 7, 9, requires_grad=True), None, None, 0, False, None, None, None)
    torch.library.opcheck(op.attention_weights.overload, weights)
    cache = [torch.randn(2, 32, 2, d) for d in (16, 8)]
    lengths = torch.tensor([3, 20], dtype=torch.int32)
    rest = (None,) * 5 + (False, None, 0, False, None, None, None, None)
    torch.library.opcheck(op.attention_kvcache.overload, (torch.randn(2, 1, 4, 16), *cache, lengths, None, None, *rest))
    new = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 8)
    torch.library.opcheck(
        op.attention_kvcache_append.overload, (torch.randn(2, 1, 4, 16), *cache, lengths, *new, *rest)
    )


def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A small graph with work on both sides of the op, through o and lse."""
    o, lse = attention(q * 2, k, v, causal=True, bias=bias, softcap=9.0, return_lse=True)
    return o.relu().sum() + lse.sin().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    """fullgraph, forward and backward; with dynamic shapes one graph serves several lengths."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for seqlen in (7, 11, 13) if dynamic else (7,):
            leaves = [*qkv(seqlen, seqlen, grad=True), torch.randn(4, seqlen, seqlen, requires_grad=True)]
            expected = layer(*leaves)
            found = compiled(*leaves)
            torch.testing.assert_close(found, expected)
            gradients = zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True)
            for g, e in gradients:
                torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_compile_dropout_draws_anew() -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda: attention(q, k, v, dropout_p=0.5), fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    torch.manual_seed(1)
    assert not torch.equal(first, second) and torch.equal(first, compiled())


def test_compile_kvcache_writes_the_cache() -> None:
    torch._dynamo.reset()
    q, lengths = torch.randn(2, 1, 4, 16), torch.tensor([3, 20], dtype=torch.int32)
    k, v = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 8)
    caches = [torch.randn(2, 32, 2, d) for d in (16, 8)]
    copies = [c.clone() for c in caches]

    def step(q, k, v, k_cache, v_cache):
        return attention_kvcache(q, k_cache, v_cache, lengths, k=k, v=v) + 1

    expected = step(q, k, v, *copies)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k, v, *caches), expected)
    for cache, copy in zip(caches, copies, strict=True):
        assert torch.equal(cache, copy)


def test_compile_says_the_same_sentence() -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True)
    with pytest.raises(Exception, match=r"attention: k must be of the headdim of q \(16\), got 15"):
        compiled(q, k[..., :15], v)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and traces sizes as constants where it can
def test_jit_trace_records_the_operations() -> None:
    """And takes no result for a constant."""

    def block(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = fastattn.rms_norm(fastattn.layer_norm(x), weight)
        q, k = fastattn.rope_qk(h, fastattn.rope(x, cos, sin), cos, sin)
        return x + attention(q, k, h, causal=True)

    tables = fastattn.ops.rope.tables.plain(9, 16)
    for grad in (False, True):
        weight = torch.rand(16, requires_grad=grad)
        traced = torch.jit.trace(block, (torch.randn(2, 5, 4, 16), weight.detach(), *tables))
        assert sum(node.kind().startswith("fastattn::") for node in traced.graph.nodes()) == 5
        x = torch.randn(3, 9, 4, 16)
        found, expected = traced(x, weight, *tables), block(x, weight, *tables)
        torch.testing.assert_close(found, expected)
        if grad:
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weight) for y in (found, expected)))


def test_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    q, k, v = qkv()
    program = torch.export.export(Block(), (q, k, v))
    assert "fastattn.attention_fwd.default" in str(program.graph)
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v, causal=True))


def test_fake_tensors_follow_the_real_ones() -> None:
    """Same shapes, dtypes, strides and errors, without data; packed calls too."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(dtype=torch.bfloat16))
    real = attention(q, k, v, return_lse=True)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = attention(*(mode.from_tensor(t) for t in (q, k, v)), return_lse=True)
        x = torch.empty(4, 2, 16)
        assert (
            attention(x, x, x, cu_seqlens_q=mode.from_tensor(cu), mask=torch.ones(1, 1, 1, 4).bool()).shape == x.shape
        )
        with pytest.raises(ValueError, match="attention: v must be"):
            attention(torch.empty(1, 2, 2, 8), torch.empty(1, 3, 2, 8), torch.empty(1, 4, 2, 8))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_autocast() -> None:
    q, k, v = qkv(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(q, k, v)
        expected = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True).transpose(
            1, 2
        )
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected)
    assert torch.equal(o, attention(*(t.bfloat16() for t in (q, k, v))))
    (dq,) = torch.autograd.grad(o.sum(), (q,))
    assert dq.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*(t.double() for t in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_drops_the_same_pairs(use_reentrant: bool) -> None:
    leaves = qkv(grad=True)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        call = lambda q, k, v: attention(q, k, v, dropout_p=0.4)  # noqa: E731
        o = checkpoint(call, *leaves, use_reentrant=use_reentrant) if wrapped else call(*leaves)
        for t in leaves:
            t.grad = None
        o.square().sum().backward()
        gradients.append([o.detach(), *(t.grad for t in leaves)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_vmap() -> None:
    q, k, v = (torch.stack([t, t + 1, t - 1]) for t in qkv())
    found = torch.func.vmap(lambda q, k, v: attention(q, k, v, causal=True))(q, k, v)
    for i in range(3):
        assert torch.equal(found[i], attention(q[i], k[i], v[i], causal=True))
    shared = torch.func.vmap(lambda q: attention(q, k[0], v[0]))(q)
    assert torch.equal(shared[2], attention(q[2], k[0], v[0]))


def test_func_grad_and_per_sample_gradients() -> None:
    q, k, v = qkv()

    def loss(q: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v).square().sum()

    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(torch.stack([q, q]))[1], expected)


def test_flop_counter() -> None:
    """As torch counts SDPA: 2 FLOPs per multiply-add, masks not subtracted; the backward has five products."""
    leaves = qkv(grad=True)
    pairs = 2 * 4 * 7 * 9
    with FlopCounterMode(display=False) as counter:
        o = attention(*leaves, causal=True)
        assert counter.get_total_flops() == 2 * pairs * (16 + 8)
        o.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (16 + 8) + 2 * pairs * (3 * 16 + 2 * 8)


def _everywhere(x: torch.Tensor) -> dict[str, Any]:
    """Each differentiable operation as a function of x [batch, seqlen, nheads, headdim]."""
    lse = torch.zeros(x.shape[0], x.shape[2], x.shape[1], device=x.device)
    return {
        "attention": lambda x: attention(x, x.detach(), x.detach(), causal=True),
        "attention_weights": lambda x: attention_weights(x, x.detach(), lse, causal=True),
        "layer_norm": fastattn.layer_norm,
        "rms_norm": fastattn.rms_norm,
    }


def test_second_derivatives_are_refused() -> None:
    """Once differentiable: asking for more is an error, not a silent zero, whatever the first gradient depends on."""
    x = torch.randn(2, 5, 4, 8, requires_grad=True)
    for name, f in _everywhere(x).items():
        for total in (f(x).square().sum(), f(x).sum()):
            (dx,) = torch.autograd.grad(total, x, create_graph=True)
            with pytest.raises(RuntimeError, match=f"{name}.* derivative is not implemented"):
                torch.autograd.grad(dx.square().sum() + total, x)
        with pytest.raises(RuntimeError, match=f"{name}.* derivative is not implemented"):
            torch.func.grad(lambda x, f=f: torch.func.grad(lambda x: f(x).sum())(x).square().sum())(x.detach())


def test_a_rotation_is_linear_in_its_gradient() -> None:
    x, table = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randn(5, 4)
    (dx,) = torch.autograd.grad(fastattn.rope(x, table, table).sum(), x, create_graph=True)
    assert not dx.requires_grad


def test_forward_mode_is_refused() -> None:
    """A tangent is not dropped in silence; calls without tangents work beside it."""
    x = torch.randn(2, 5, 4, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for f in (*_everywhere(x).values(), lambda x: fastattn.rope(x, torch.ones(5, 4), torch.ones(5, 4))):
            with pytest.raises(NotImplementedError, match="jvp"):
                f(dual)
            assert f(x).isfinite().all()


def test_meta_tensors_have_the_shapes_of_real_ones() -> None:
    def run(device: str) -> list[torch.Tensor]:
        x = torch.zeros(2, 5, 4, 8, device=device, requires_grad=True)
        rows, lengths = x.flatten(0, 1), torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
        found = [f(x) for f in _everywhere(x).values()]
        found += [
            attention(x, x, x, dropout_p=0.1),
            *attention(rows, rows, rows, cu_seqlens_q=lengths, return_lse=True),
        ]
        found += torch.autograd.grad(sum(t.sum() for t in found), [x])
        with torch.no_grad():
            one, table = x[:, :1], torch.zeros(9, 4, device=device)
            caches = [torch.zeros(2, 9, 4, 8, device=device) for _ in range(2)]
            found.append(attention_kvcache(one, *caches, lengths[:2], k=one, v=one, cos=table, sin=table))
        return found

    for real, meta in zip(run("cpu"), run("meta"), strict=True):
        assert meta.is_meta and (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_in_words() -> None:
    parts = [torch.randn(3, 4, 8), torch.randn(5, 4, 8)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        with pytest.raises(ValueError, match="attention: q must be a plain tensor"):
            attention(nested, nested, nested)


def test_what_a_hook_makes_of_saved_tensors_is_checked_again() -> None:
    tensors = qkv(grad=True)
    expected = torch.autograd.grad(attention(*tensors, backend="reference").sum(), tensors)
    for unpack, fits in ((torch.Tensor.clone, True), (lambda t: t.mT.contiguous().mT if t.dim() == 4 else t, False)):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            total = attention(*tensors, backend="reference").sum()
        if fits:
            torch.testing.assert_close(torch.autograd.grad(total, tensors), expected)
        else:
            with pytest.raises(ValueError, match="unit last stride"):
                total.backward()


def test_gradients_where_options_stand_between_the_tensors() -> None:
    """Which arguments are tensors decides what autograd gets to see: a bias, sinks, or neither."""
    q, k, v = qkv(grad=True)
    bias, sinks = torch.randn(7, 9, requires_grad=True), torch.randn(4, requires_grad=True)
    for options in ({}, {"bias": bias}, {"sinks": sinks}, {"bias": bias.detach(), "sinks": sinks}):
        wanted = [q, k, v, *(t for t in options.values() if t.requires_grad)]
        got = torch.autograd.grad(attention(q, k, v, **options).square().sum(), wanted)
        plain = torch.autograd.grad(fastattn.reference.attention(q, k, v, **options).square().sum(), wanted)
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


def test_inference_mode() -> None:
    with torch.inference_mode():
        q, k, v = qkv()
        o, lse = attention(q, k, v, return_lse=True)
        assert attention_weights(q, k, lse).shape == (2, 4, 7, 9)
        caches = [torch.zeros(2, 32, 2, d) for d in (16, 8)]
        lengths = torch.tensor([0, 4], dtype=torch.int32)
        attention_kvcache(q, *caches, lengths, k=k, v=v)
    assert o.isfinite().all() and torch.equal(caches[0][0, :9], k[0])


def test_forced_backend_serves_the_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.ops.attention import _reference

    called = []
    backward = _reference.backward
    monkeypatch.setattr(_reference, "backward", lambda *args: called.append("reference") or backward(*args))
    q, k, v = qkv(grad=True)
    with fastattn.use_backend("reference"):
        o = attention(q, k, v)
    o.sum().backward()
    assert called == ["reference"]
