"""Every kernel on shapes at the edges of its tiles, forward and backward, on every instruction set.

A smoke test in the ordinary suite; its purpose is `make sanitize`, where a read or write outside a tensor ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastattn
from fastattn.runtime import native

pytestmark = pytest.mark.skipif(native.error() is not None, reason=str(native.error()))
ISAS = native.module().isas() if native.error() is None else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.module().isa()
    native.module().set_isa(request.param)
    yield request.param
    native.module().set_isa(before)


def _finite(*tensors: torch.Tensor | None) -> None:
    for t in tensors:
        assert t is None or torch.isfinite(t).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "headdim", "headdim_v"),
    [(1, 1, 1, 1), (1, 239, 8, 8), (33, 31, 59, 40), (113, 203, 64, 80), (130, 257, 17, 33)],
)
def test_attention(dtype, seqlen_q, seqlen_k, headdim, headdim_v):
    q = torch.randn(2, seqlen_q, 4, headdim).to(dtype).requires_grad_()
    k = torch.randn(2, seqlen_k, 2, headdim).to(dtype).requires_grad_()
    v = torch.randn(2, seqlen_k, 2, headdim_v).to(dtype).requires_grad_()
    bias = torch.randn(1, 4, seqlen_q, seqlen_k).requires_grad_()
    sinks = torch.randn(4).requires_grad_()
    mask = torch.rand(2, 1, seqlen_q, seqlen_k) > 0.3
    options = [
        {},
        {"causal": True, "window": (9, None)},
        {"mask": mask, "bias": bias, "sinks": sinks, "softcap": 5.0, "alibi_slopes": torch.rand(4)},
        {"causal": "upper_left", "dropout_p": 0.2},
        {"mask": torch.rand(2, 1, 1, seqlen_k) > 0.5},
        {"bias": torch.randn(seqlen_k)},
    ]
    for option in options:
        o, lse = fastattn.attention(q, k, v, return_lse=True, **option)
        _finite(o)
        _finite(*torch.autograd.grad(o.float().sum() + lse.where(lse.isfinite(), 0).sum(), (q, k, v)))
        if "dropout_p" not in option and "sinks" not in option:
            _finite(fastattn.attention_weights(q, k, lse, **option))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype):
    cu = torch.tensor([0, 0, 37, 38, 101], dtype=torch.int32)
    q, k, v = (torch.randn(101, 3, 24).to(dtype).requires_grad_() for _ in range(3))
    o = fastattn.attention(q, k, v, cu_seqlens_q=cu, causal=True)
    _finite(o, *torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paged", [False, True])
def test_kvcache(dtype, paged):
    seqlens = torch.tensor([0, 45, 61], dtype=torch.int32)
    shape = (12, 16, 2, 40) if paged else (3, 64, 2, 40)
    table = torch.randperm(12).to(torch.int32).reshape(3, 4) if paged else None
    k_cache, v_cache = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    q = torch.randn(3, 3, 6, 40).to(dtype)
    k, v = (torch.randn(3, 3, 2, 40).to(dtype) for _ in range(2))
    cos, sin = torch.randn(64, 20), torch.randn(64, 20)
    _finite(fastattn.attention_kvcache(q, k_cache, v_cache, seqlens, k=k, v=v, block_table=table, cos=cos, sin=sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 7, 64, 129, 1000])
def test_norms(dtype, cols):
    x, residual = (torch.randn(5, cols).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = torch.randn(cols).requires_grad_(), torch.randn(cols).requires_grad_()
    y, total = fastattn.layer_norm(x, weight, bias, residual=residual)
    _finite(y, total, *torch.autograd.grad((y + total).sum(), (x, residual, weight, bias)))
    y, total = fastattn.rms_norm(x, weight, residual=residual)
    _finite(y, total, *torch.autograd.grad((y + total).sum(), (x, residual, weight)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dtype, interleaved):
    q, k = torch.randn(2, 7, 3, 50).to(dtype).requires_grad_(), torch.randn(2, 7, 1, 50).to(dtype).requires_grad_()
    cos, sin = torch.randn(7, 13), torch.randn(7, 13)
    q_out, k_out = fastattn.rope_qk(q, k, cos, sin, interleaved=interleaved)
    _finite(q_out, k_out, *torch.autograd.grad(q_out.sum() + k_out.sum(), (q, k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_large_call_are_those_of_its_halves(dtype):
    """Bit by bit, though above 24 MB gradients are written around the cache."""
    batch = 200 // dtype.itemsize  # 26 MB with the gradients, 13 MB a half

    def gradients(q, k, v, do):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(fastattn.attention(*inputs, causal=True), inputs, do)

    tensors = [torch.randn(batch, 16, 16, 64).to(dtype) for _ in range(4)]
    halves = zip(*(t.chunk(2) for t in tensors), strict=True)
    joined = (torch.cat(parts) for parts in zip(*(gradients(*half) for half in halves), strict=True))
    for whole, parts in zip(gradients(*tensors), joined, strict=True):
        assert torch.equal(whole, parts)
