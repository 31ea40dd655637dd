"""The operators behind the SDPA hook on CUDA. Their glue runs here on CPU tensors; tests/test_gpu.py has it on a GPU, and in the
rehearsal, under torch's own choice among them.
"""

from __future__ import annotations

from typing import Any

import law
import pytest
import torch
from sdpa_calls import qkv

import fastattn
from fastattn.runtime import native
from fastattn.sdpa import _cuda_flash, _cuda_fused

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(native.error() is not None, reason=str(native.error()))


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
