"""What only a GPU can show: whole paths through torch on CUDA tensors. Each kernel's own tests run there as well.

Skipped without a GPU; `benchmarks/gpu_queue.sh test` runs it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import law
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.ops.attention import reference
from fastattn.runtime import cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = (torch.bfloat16, torch.float16)


def qkv(seqlen: int, dtype: torch.dtype, nheads_k: int = 4) -> dict[str, torch.Tensor]:
    shapes = {"q": (2, seqlen, 4, 64), "k": (2, seqlen, nheads_k, 64), "v": (2, seqlen, nheads_k, 64)}
    return {name: law.randn(*s, dtype=dtype, seed=i).cuda() for i, (name, s) in enumerate(shapes.items())}


def test_cuda_comes_before_triton() -> None:
    found = fastattn.explain(fastattn.attention, **qkv(64, torch.bfloat16))
    assert found.chosen == "cuda" and not found.objections["triton"], found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", [1, 113, 512, 1023])
def test_the_tiles_of_the_gpu_keep_the_law(seqlen: int, causal: bool, dtype: torch.dtype) -> None:
    options = {"causal": causal, "return_lse": True}
    law.check(fastattn.attention, reference.attention, qkv(seqlen, dtype), options, wants=("q", "k", "v"))


KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention")


def _sdpa_options(kind: str, dtype: torch.dtype, seqlen: int) -> dict[str, Any]:
    if kind == "padding":
        return {"attn_mask": (torch.arange(seqlen) < torch.tensor([[seqlen], [seqlen - 50]]))[:, None, None].cuda()}
    if kind == "bias":
        return {"attn_mask": law.randn(4, seqlen, seqlen, dtype=dtype, seed=9)[None].cuda()}
    return {"is_causal": kind == "causal"}


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    mask = options.get("attn_mask")
    if mask is None:
        return {"causal": options["is_causal"]}
    return {"mask" if mask.dtype == torch.bool else "bias": mask}


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32))
@pytest.mark.parametrize("kind", ["dense", "causal", "padding", "bias"])
@pytest.mark.parametrize("kernel", ("as torch likes", *KERNELS))
def test_the_sdpa_hook_serves_cuda(kernel: str, kind: str, dtype: torch.dtype) -> None:
    """Whichever of its kernels torch chooses, or is told to; eager and compiled."""
    torch._dynamo.reset()
    tensors = qkv(144, dtype)
    options = _sdpa_options(kind, dtype, 144)

    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    chosen = contextlib.nullcontext() if kernel not in KERNELS else sdpa_kernel(getattr(SDPBackend, kernel.upper()))
    with fastattn.sdpa.enabled(), chosen:
        service = fastattn.sdpa.explain(*(t.transpose(1, 2) for t in tensors.values()), **options)
        if service.kernel == "none":
            pytest.skip(f"{kernel} alone: {service}")
        assert service.server == "fastattn", service
        found = law.run(by_torch, tensors, {}, ("q", "k", "v"), ("o",), 0)
        compiled = law.run(torch.compile(by_torch, fullgraph=True), tensors, {}, ("q", "k", "v"), ("o",), 0)
    reference_options = _plain_options(options)
    plain = law.run(reference.attention, tensors, reference_options, ("q", "k", "v"), ("o",), 0)
    wide = {name: t.double() for name, t in tensors.items()}
    if "bias" in reference_options:
        reference_options["bias"] = reference_options["bias"].double()
    truth = law.run(reference.attention, wide, reference_options, ("q", "k", "v"), ("o",), 0)
    for name in truth:
        law.compare(name, found[name], plain[name], truth[name], dtype)
        law.compare(name, compiled[name], plain[name], truth[name], dtype)


def test_the_sdpa_hook_serves_a_bias_that_wants_a_gradient() -> None:
    """T5's; the bias is shared by the batch, so that torch expands it."""
    q, k, v = (t.transpose(1, 2) for t in qkv(48, torch.bfloat16).values())
    bias = law.randn(1, 4, 48, 48, dtype=torch.bfloat16, seed=9).cuda().requires_grad_()
    with fastattn.sdpa.enabled():
        assert fastattn.sdpa.explain(q, k, v, bias).server == "fastattn"
        o = F.scaled_dot_product_attention(q, k, v, bias)
        (found,) = torch.autograd.grad(o, bias, torch.ones_like(o) * torch.arange(64, device="cuda"))
    leaf = bias.detach().double().requires_grad_()
    o = reference.attention(*(t.transpose(1, 2).double() for t in (q, k, v)), bias=leaf)
    (truth,) = torch.autograd.grad(o, leaf, torch.ones_like(o) * torch.arange(64, device="cuda"))
    torch.testing.assert_close(found.double(), truth, rtol=3e-2, atol=3e-2 * float(truth.abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_sdpa_hook_drops_the_same_elements_backward(kernel: str) -> None:
    """With v the identity the output is the matrix of probabilities, and so is dv for do the identity, transposed."""
    q, k = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.eye(64, device="cuda", dtype=torch.bfloat16).expand(1, 2, 64, 64).clone().requires_grad_()
    with fastattn.sdpa.enabled(), sdpa_kernel(getattr(SDPBackend, kernel.upper())):
        p = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        (dv,) = torch.autograd.grad(p, v, torch.eye(64, device="cuda", dtype=torch.bfloat16).expand(1, 2, 64, 64))
    assert 0.3 < (p == 0).float().mean() < 0.7
    assert torch.equal(dv.transpose(-1, -2) == 0, p == 0)


@pytest.mark.parametrize("option", ["headdims that differ", "grouped heads"])
def test_the_sdpa_hook_serves_other_shapes(option: str) -> None:
    tensors = qkv(80, torch.bfloat16, nheads_k=2 if option == "grouped heads" else 4)
    if option == "headdims that differ":
        tensors["v"] = tensors["v"][..., :32]
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in tensors.values())
    grouped = {"enable_gqa": option == "grouped heads"}
    with fastattn.sdpa.enabled():
        service = fastattn.sdpa.explain(q, k, v, **grouped)
        assert service.server == "fastattn", service
        o = F.scaled_dot_product_attention(q, k, v, **grouped)
        found = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    leaves = [t.detach().transpose(1, 2).double().requires_grad_() for t in (q, k, v)]
    truth = reference.attention(*leaves)
    torch.testing.assert_close(o.transpose(1, 2).double(), truth, rtol=2e-2, atol=2e-2)
    for gradient, expected in zip(found, torch.autograd.grad(truth, leaves, torch.ones_like(truth)), strict=True):
        torch.testing.assert_close(gradient.transpose(1, 2).double(), expected, rtol=3e-2, atol=3e-2)


def test_the_sdpa_hook_serves_a_padded_bert_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.BertModel(config).cuda().to(torch.bfloat16).train()
    launched, run = [], cuda.run
    monkeypatch.setattr(cuda, "run", lambda kernel, *args: (launched.append(kernel.name), run(kernel, *args)))
    attention_mask = torch.ones(2, 40, dtype=torch.int64, device="cuda")
    attention_mask[1, 30:] = 0
    with fastattn.sdpa.enabled():
        found = model(torch.ones_like(attention_mask), attention_mask).last_hidden_state
        found.sum().backward()
    assert torch.isfinite(found).all() and all(torch.isfinite(p.grad).all() for p in model.encoder.parameters())
    assert sum("fwd" in name for name in launched) == 2 and sum("delta" in name for name in launched) == 2


def _calls() -> dict[str, Any]:
    x, weight = torch.randn(64, 256, device="cuda"), torch.ones(256, device="cuda")
    tensors = qkv(128, torch.bfloat16)
    cache = torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([100, 512], dtype=torch.int32, device="cuda")
    cos, sin = torch.randn(2, 128, 32, device="cuda").unbind(0)
    return {
        "attention": lambda: fastattn.attention(**tensors, causal=True),
        "attention_kvcache": lambda: fastattn.attention_kvcache(tensors["q"][:, :1], cache, cache, lengths),
        "rms_norm": lambda: fastattn.rms_norm(x, weight),
        "layer_norm": lambda: fastattn.layer_norm(x, weight, weight),
        "rope": lambda: fastattn.rope(tensors["q"], cos, sin),
    }


@pytest.mark.parametrize("name", ["attention", "attention_kvcache", "rms_norm", "layer_norm", "rope"])
def test_cuda_graphs_replay_the_same_bits(name: str) -> None:
    call = _calls()[name]
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("name", ["attention", "attention_kvcache", "rms_norm", "layer_norm", "rope"])
def test_the_cuda_kernels_under_a_sanitizer(name: str) -> None:
    """Run under compute-sanitizer by `gpu_queue.sh sanitize`; here it shows that these calls are served at all."""
    with fastattn.use_backend("cuda"):
        assert torch.isfinite(_calls()[name]()).all()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 0)}, {"softcap": 5.0}])
def test_the_cuda_backward_under_a_sanitizer(options: dict[str, Any]) -> None:
    tensors = {name: t.requires_grad_() for name, t in qkv(113, torch.bfloat16).items()}
    with fastattn.use_backend("cuda"):
        o = fastattn.attention(**tensors, **options)
        for gradient in torch.autograd.grad(o, list(tensors.values()), torch.ones_like(o)):
            assert torch.isfinite(gradient).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_tensors_decide_which_gpu_computes(backend: str) -> None:
    """Also in the backward, whose threads are autograd's, and when another GPU is the current one."""
    tensors = qkv(113, torch.bfloat16)
    found = []
    for device in ("cuda:0", "cuda:1"):
        leaves = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
        with fastattn.use_backend(backend), torch.cuda.device(1 - torch.device(device).index):
            o = fastattn.attention(**leaves, causal=True)
            gradients = torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))
            norm = fastattn.rms_norm(leaves["q"], torch.ones(64, device=device))
        outputs = [o, *gradients, norm]
        assert all(t.device == torch.device(device) for t in outputs)
        found.append([t.cpu() for t in outputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["attention", "attention_kvcache", "rms_norm", "layer_norm", "rope"])
def test_compiled_code_gives_the_same_bits(name: str) -> None:
    call = _calls()[name]
    assert torch.equal(torch.compile(call, fullgraph=True)(), call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_llama_agrees_with_eager(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).cuda().to(dtype).eval()
    ids = torch.randint(0, 512, (2, 96), device="cuda")
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 76:] = 0
    given = {"input_ids": ids, "attention_mask": attention_mask}
    with torch.no_grad():
        plain = model(**given).logits
        fastattn.hf.patch(model)
        found = model(**given).logits
        fastattn.hf.unpatch(model)
        truth = model.double()(**given).logits
    seen = attention_mask.bool()
    law.compare("logits", found[seen], plain[seen], truth[seen], dtype)
