"""What only a GPU can show: whole paths through torch on CUDA tensors. Each kernel's own tests run there as well.

Skipped without a GPU; `benchmarks/gpu_queue.sh test` runs it.
"""

from __future__ import annotations

from typing import Any

import law
import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.ops.attention import reference

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_sdpa_hook_serves_cuda(causal: bool, dtype: torch.dtype) -> None:
    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    tensors = qkv(256, dtype)
    with fastattn.sdpa.enabled():
        q, k, v = (t.transpose(1, 2) for t in tensors.values())
        assert fastattn.sdpa.explain(q, k, v, is_causal=causal).server == "fastattn"
        found = law.run(by_torch, tensors, {}, ("q", "k", "v"), ("o",), 0)
        compiled = law.run(torch.compile(by_torch, fullgraph=True), tensors, {}, ("q", "k", "v"), ("o",), 0)
    plain = law.run(reference.attention, tensors, {"causal": causal}, ("q", "k", "v"), ("o",), 0)
    wide = {name: t.double() for name, t in tensors.items()}
    truth = law.run(reference.attention, wide, {"causal": causal}, ("q", "k", "v"), ("o",), 0)
    for name in truth:
        law.compare(name, found[name], plain[name], truth[name], dtype)
        law.compare(name, compiled[name], plain[name], truth[name], dtype)


def test_the_sdpa_hook_drops_the_same_elements_backward() -> None:
    """With v the identity the output is the matrix of probabilities, and so is dv for do the identity, transposed."""
    q, k = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.eye(64, device="cuda", dtype=torch.bfloat16).expand(1, 2, 64, 64).clone().requires_grad_()
    with fastattn.sdpa.enabled():
        p = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        (dv,) = torch.autograd.grad(p, v, torch.eye(64, device="cuda", dtype=torch.bfloat16).expand(1, 2, 64, 64))
    assert 0.3 < (p == 0).float().mean() < 0.7
    assert torch.equal(dv.transpose(-1, -2) == 0, p == 0)


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
