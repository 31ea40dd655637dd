"""The attention function under transformers' contract: each argument is right or refused by name."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

import fastattn
import fastattn.hf
from fastattn.hf import models, table
from fastattn.hf.attention import REFUSED, fastattn_attention
from fastattn.hf.compact import CompactMask
from fastattn.hf.law import float64, law
from fastattn.hf.masks import fastattn_mask

Tensor = torch.Tensor
logging.set_verbosity_error()
BY_NAME = {family.name: family for family in models.FAMILIES}


class Decoder(torch.nn.Module):
    is_causal = True


class Encoder(torch.nn.Module):
    is_causal = False


def qkv(q: int = 5, k: int = 5, headdim_v: int = 8, **kinds: Any) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 4, q, 8), (2, 2, k, 8), (2, 2, k, headdim_v))
    return tuple(torch.randn(size, generator=g, **kinds) for size in sizes)  # type: ignore[return-value]


def plain(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return fastattn.reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_register_is_idempotent_and_registers_the_mask_function_too():
    fastattn.hf.register()
    fastattn.hf.register()
    assert AttentionInterface._global_mapping["fastattn"] is fastattn_attention
    assert AttentionMaskInterface._global_mapping["fastattn"] is fastattn_mask


def test_without_a_mask_the_module_decides():
    x = qkv()
    close(fastattn_attention(Decoder(), *x, None)[0], plain(*x, causal=True))
    close(fastattn_attention(Encoder(), *x, None)[0], plain(*x))
    close(fastattn_attention(torch.nn.Module(), *x, None)[0], plain(*x, causal=True))
    close(fastattn_attention(Decoder(), *x, None, is_causal=False)[0], plain(*x))
    x = qkv(3, 7)  # cross-attention that says nothing (Mllama)
    close(fastattn_attention(torch.nn.Module(), *x, None)[0], plain(*x))


def _small(name: str, **sizes: Any) -> torch.nn.Module:
    """A causal model of a family that is not in the table."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=models.VOCABULARY, pad_token_id=0, num_hidden_layers=3, num_attention_heads=4, hidden_size=64,
        intermediate_size=96, max_position_embeddings=64, **sizes,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return models.spread(getattr(transformers, f"{name}ForCausalLM")(config)).eval()


def _agrees(model: Any, given: dict[str, Tensor]) -> None:
    tokens = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    with torch.no_grad():
        eager = model(**given, use_cache=False).logits[tokens]
        report = fastattn.hf.patch(model)
        ours = model(**given, use_cache=False).logits[tokens]
    assert report.replaced("attention") > 0
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4 * float(eager.abs().max()))


PADDINGS = ("none", "left", "right")


def _tokens(padding: str) -> dict[str, Tensor]:
    given = models.inputs(BY_NAME["BERT"], padding)
    return {k: v for k, v in given.items() if k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_decoder_that_says_it_is_not_causal(padding: str):
    """BigBird-Pegasus' modules do; its mask function knows better."""
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
    _agrees(_small("BigBirdPegasus", **sizes), _tokens(padding))


@pytest.mark.parametrize("padding", PADDINGS)
def test_models_that_edit_additive_masks_get_those(padding: str):
    """DeepSeek-V4 appends columns of 0 and -inf; a boolean mask would turn them into their opposite."""
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this transformers has no DeepSeek-V4")
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    model: Any = _small("DeepseekV4", head_dim=16, q_lora_rank=24, sliding_window=9, **experts)
    model.set_experts_implementation("eager")
    _agrees(model, _tokens(padding))


def test_which_models_get_additive_masks():
    from fastattn.hf.masks import _wants_additive_masks

    importlib.import_module("transformers.models.bigbird_pegasus.modeling_bigbird_pegasus")
    for name, wants in (("Llama", False), ("Gemma2", False), ("GptOss", False), ("BigBirdPegasus", True)):
        assert _wants_additive_masks(getattr(transformers, f"{name}Config")) == wants


def test_one_query_sees_every_key():
    x = qkv(1, 7)
    close(fastattn_attention(Decoder(), *x, None)[0], plain(*x))


def test_the_empty_static_cache_is_cropped():
    q, k, v = qkv(4, 9)
    k[:, :, 4:], v[:, :, 4:] = float("nan"), float("nan")
    close(fastattn_attention(Decoder(), q, k, v, None)[0], plain(q, k[:, :, :4], v[:, :, :4], causal=True))


def test_values_narrower_than_queries_scale_and_softcap():
    x = qkv(headdim_v=6)
    ours, weights = fastattn_attention(Decoder(), *x, None, scaling=0.2, softcap=3.0)
    assert ours.shape == (2, 5, 4, 6) and ours.is_contiguous() and weights is None
    close(ours, plain(*x, causal=True, scale=0.2, softcap=3.0))


def test_four_dimensional_masks_are_taken_as_they_are():
    x = qkv()
    allowed = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[..., 0] = True
    close(fastattn_attention(Decoder(), *x, allowed)[0], plain(*x, mask=allowed))
    additive = torch.where(allowed, 0.3, torch.finfo(torch.float32).min)
    close(fastattn_attention(Decoder(), *x, additive)[0], plain(*x, bias=additive))
    close(fastattn_attention(Decoder(), *x, additive.double())[0], plain(*x, bias=additive))
    wider = torch.cat([allowed, allowed], -1)
    close(fastattn_attention(Decoder(), *x, wider)[0], plain(*x, mask=allowed))


def test_the_row_of_a_static_cache_crops_the_keys(monkeypatch: pytest.MonkeyPatch):
    x = qkv(1, 7)
    seen: list[dict[str, Any]] = []
    honest = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *a, **o: seen.append(o | {"n": a[1].shape[1]}) or honest(*a, **o))
    row = (torch.arange(7) < 5)[None, None, None].expand(2, 1, 1, 7).clone()
    close(fastattn_attention(Decoder(), *x, row)[0], plain(*x, mask=row))
    close(fastattn_attention(Decoder(), *x, row)[0], plain(*x, mask=row))
    assert [(o["n"], "mask" in o) for o in seen] == [(5, False)] * 2
    row[1, ..., 0] = False  # written in place: a hole, in one row of the batch
    close(fastattn_attention(Decoder(), *x, row)[0], plain(*x, mask=row))
    close(fastattn_attention(Decoder(), *x, ~row)[0], plain(*x, mask=~row))
    nothing = torch.zeros_like(row)
    assert not fastattn_attention(Decoder(), *x, nothing)[0].any()
    assert all("mask" in o for o in seen[2:])


def test_two_dimensional_masks_are_padding_and_keep_causality():
    x = qkv()
    tokens = torch.arange(5) < torch.tensor([[5], [3]])
    for given in (tokens, tokens.long()):
        close(fastattn_attention(Decoder(), *x, given)[0], plain(*x, mask=tokens[:, None, None], causal=True))
        close(fastattn_attention(Encoder(), *x, given)[0], plain(*x, mask=tokens[:, None, None]))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 5, 5), "2 or 4 dimensions, got (2, 5, 5)"),
        (torch.ones(2, 1, 5, 5, dtype=torch.int64), "boolean or floating when it has 4 dimensions, got torch.int64"),
        (torch.ones(2, 4, dtype=torch.bool), "padding [batch, seqlen_k] (2, 5) when it has 2"),
        (torch.zeros(2, 5), "padding [batch, seqlen_k] (2, 5) when it has 2"),
        ("mask", "None or a tensor"),
    ],
)
def test_masks_that_cannot_be_understood_are_refused(mask: Any, words: str):
    with pytest.raises(ValueError, match=r"fastattn\.hf: attention_mask must be") as refused:
        fastattn_attention(Decoder(), *qkv(), mask)
    assert words in str(refused.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_here_is_refused_by_name(name: str):
    with pytest.raises(fastattn.UnsupportedError, match=f"{name} must be None"):
        fastattn_attention(Decoder(), *qkv(), None, **{name: torch.ones(1)})


def test_arguments_that_leak_in_change_nothing():
    x = qkv()
    leaking = {"use_cache": True, "output_attentions": False, "output_hidden_states": True, "sliding_window": 2}
    leaking |= {"encoder_hidden_states": x[0], "num_items_in_batch": 3, "position_ids": torch.arange(5)[None]}
    close(fastattn_attention(Decoder(), *x, None, **leaking)[0], plain(*x, causal=True))


def test_position_bias_is_added_with_gradient_and_any_strides():
    q, k, v = qkv()
    bias = torch.randn(5, 5, 4).permute(2, 0, 1)[None].requires_grad_()
    tokens = torch.arange(5) < torch.tensor([[5], [3]])
    mask = CompactMask(2, 5, 5, fastattn.hf.masks.Pattern(right=0), 0, tokens, "cpu")
    options = {"causal": True, "scale": 1.0, "mask": tokens[:, None, None]}
    for attended, expected in (
        (fastattn_attention(Decoder(), q, k, v, mask, scaling=1.0, position_bias=bias)[0], options),
        (fastattn_attention(Decoder(), q, k, v, None, scaling=1.0, position_bias=bias)[0], options | {"mask": None}),
    ):
        reference = plain(q, k, v, bias=bias, **expected)
        close(attended, reference)
        ours, theirs = (torch.autograd.grad(o.square().sum(), bias)[0] for o in (attended, reference))
        close(ours, theirs)


def test_sinks_have_a_gradient():
    x = qkv()
    sinks = torch.randn(4).requires_grad_()
    ours = fastattn_attention(Decoder(), *x, None, s_aux=sinks)[0]
    reference = plain(*x, causal=True, sinks=sinks)
    close(ours, reference)
    close(*(torch.autograd.grad(o.square().sum(), sinks)[0] for o in (ours, reference)))


def test_dropout_drops_what_the_reference_drops():
    x = qkv(64, 64)
    found = []
    for backend in (None, "reference"):
        torch.manual_seed(3)
        with fastattn.use_backend(backend):
            found.append(fastattn_attention(Decoder(), *x, None, dropout=0.4)[0])
    close(*found)
    assert float((found[0] - plain(*x, causal=True)).abs().max()) > 0.1


def test_packed_sequences_by_cu_seq_lens():
    q, k, v = qkv(6, 6)
    cu = torch.tensor([0, 4, 6, 12])
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    ours = fastattn_attention(Decoder(), q, k, v, None, **given)[0]
    segments = torch.tensor([[0] * 4 + [1] * 2, [2] * 6])
    same = (segments[:, :, None] == segments[:, None])[:, None]
    close(ours, plain(q, k, v, causal=True, mask=same))
    with pytest.raises(fastattn.UnsupportedError, match="cu_seq_lens_k must be cu_seq_lens_q"):
        fastattn_attention(Decoder(), q, k, v, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu + 1)
    with pytest.raises(ValueError, match=r"ending at the tokens of the batch \(12\), got 6"):
        fastattn_attention(Decoder(), q, k, v, None, cu_seq_lens_q=cu[:3], cu_seq_lens_k=cu[:3])


def test_restarting_positions_are_packed_and_checked_once(monkeypatch: pytest.MonkeyPatch):
    q, k, v = qkv(6, 6)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1]])
    segments = torch.tensor([[0] * 4 + [1] * 2])
    same = (segments[:, :, None] == segments[:, None])[:, None]
    expected = plain(q, k, v, causal=True, mask=same)
    close(fastattn_attention(Decoder(), q, k, v, None, position_ids=position_ids)[0], expected)
    monkeypatch.setattr(fastattn.hf.attention, "segments_of", None)  # remembered: nobody asks again
    close(fastattn_attention(Decoder(), q, k, v, None, position_ids=position_ids)[0], expected)
    monkeypatch.undo()
    position_ids[0, 4:] += 4  # written in place: one sequence now
    close(fastattn_attention(Decoder(), q, k, v, None, position_ids=position_ids)[0], plain(q, k, v, causal=True))


@pytest.mark.parametrize("name", ["Llama 3", "BERT", "T5", "Gemma 2"])
def test_autocast_keeps_the_law(name: str):
    family = BY_NAME[name]
    given = models.inputs(family, "right")
    model: Any = family.build()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**given)
        out.loss.backward()
        tokens = given["attention_mask"].bool() if family.kind != "encoder-decoder" else slice(None)
        gradients = {f"d {n}": p.grad.bfloat16() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": out.logits.detach().bfloat16()[tokens], "loss": out.loss.detach()} | gradients

    with float64():
        truth = table._labelled(copy.deepcopy(model).double(), given, family)
    plain = run()
    fastattn.hf.patch(model)
    ratio, broken = law(run(), plain, truth)
    assert not broken and ratio < 2


def test_prefix_tuning_has_more_keys_than_queries():
    peft = pytest.importorskip("peft")
    model = BY_NAME["Llama 3"].build()
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    given = {k: x for k, x in models.inputs(BY_NAME["Llama 3"], "left").items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        eager = tuned(**given).logits
        assert fastattn.hf.patch(tuned).replaced("attention") == 2
        ours = tuned(**given).logits
    tokens = given["attention_mask"].bool()
    torch.testing.assert_close(ours[tokens], eager[tokens], rtol=1e-4, atol=1e-4)


def test_packed_sequences_are_apart_with_a_cache_too():
    model: Any = BY_NAME["Llama 3"].build().eval()
    fastattn.hf.patch(model)
    given = models.packed_inputs()
    with torch.no_grad():
        without, fresh = (
            model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=cache).logits
            for cache in (False, True)
        )
    assert torch.equal(without, fresh)


def test_reentrant_checkpointing_gives_the_same_bits():
    model: Any = BY_NAME["Mistral"].build().train()
    fastattn.hf.patch(model)
    given: dict[str, Any] = models.inputs(BY_NAME["Mistral"], "right") | {"use_cache": False}  # type: ignore[dict-item]
    plain = table._labelled(model, given, BY_NAME["Mistral"])
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": True})
    model.enable_input_require_grads()
    again = table._labelled(model, given, BY_NAME["Mistral"])
    assert plain.keys() == again.keys() and all(torch.equal(plain[k], again[k]) for k in plain)


def test_options_of_gpt2_that_scale_layers():
    model: Any = BY_NAME["GPT-2"].build(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True).eval()
    given = {"input_ids": torch.arange(3, 20)[None]}
    with torch.no_grad():
        eager = model(**given).logits
        fastattn.hf.patch(model)
        torch.testing.assert_close(model(**given).logits, eager, rtol=1e-4, atol=1e-4)


# attention weights


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "BART", "Whisper", "Llama 3", "Mistral", "GPT-OSS", "T5", "ViT"])
def test_output_attentions_are_eager_ones(name: str):
    if fastattn.hf.attention._wanted_outputs is None and name in ("GPT-2", "ViT"):
        pytest.skip("this transformers does not tell the attention function of these models")
    family = BY_NAME[name]
    model: Any = family.build().eval()
    given = models.inputs(family, "right" if family.kind in ("decoder", "encoder") else "none")
    with torch.no_grad():
        eager = model(**given, output_attentions=True)
        fastattn.hf.patch(model)
        ours = model(**given, output_attentions=True)
        assert not ours.get("attentions") or model(**given).get("attentions") is None
    keys = [key for key in eager if "attentions" in key]
    assert keys and [key for key in ours if "attentions" in key] == keys
    tokens = given.get("attention_mask")
    for key in keys:
        for mine, theirs in zip(ours[key], eager[key], strict=True):
            assert mine.shape == theirs.shape
            if tokens is not None:
                mine, theirs = (x.transpose(1, 2)[tokens.bool()] for x in (mine, theirs))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_output_attentions_with_packed_sequences_and_with_dropout():
    q, k, v = qkv(6, 6)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1]]).expand(2, -1)
    given = {"position_ids": position_ids, "output_attentions": True}
    o, weights = fastattn_attention(Decoder(), q, k, v, None, **given)
    close(o, fastattn_attention(Decoder(), q, k, v, None, position_ids=position_ids)[0])
    assert weights is not None and not weights[:, :, 4:, :4].any()
    close(weights.sum(-1), torch.ones(2, 4, 6))
    with pytest.raises(fastattn.UnsupportedError, match="output_attentions must be False with dropout"):
        fastattn_attention(Decoder(), q, k, v, None, dropout=0.1, output_attentions=True)


# what reaches the kernel


def _seen(monkeypatch: pytest.MonkeyPatch, name: str, **given: Any) -> list[dict[str, Any]]:
    """The options of every attention call of a patched model."""
    seen: list[dict[str, Any]] = []
    honest = fastattn.attention

    def spy(*args: Any, **options: Any) -> Any:
        seen.append({key: x for key, x in options.items() if x is not None and x is not False})
        return honest(*args, **options)

    model = BY_NAME[name].build().eval()
    fastattn.hf.patch(model)
    monkeypatch.setattr(fastattn, "attention", spy)
    with torch.no_grad():
        model(**given)
    return seen


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Llama 3", "Mistral", "Gemma 3", "GPT-OSS", "DeepSeek-V3", "BART"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_no_model_builds_a_square_mask(monkeypatch: pytest.MonkeyPatch, name: str, padding: str):
    family = BY_NAME[name]
    seen = _seen(monkeypatch, name, **models.inputs(family, padding))
    assert seen
    for options in seen:
        assert "bias" not in options
        if "mask" in options:
            assert options["mask"].shape == (3, 1, 1, models.SEQLEN) and padding != "none"
    if family.kind == "decoder":
        assert all(options["causal"] is True for options in seen)
        assert any("mask" in options for options in seen) == (padding != "none")
    windows = [options["window"] for options in seen if "window" in options]
    assert set(windows) <= {(8, None)} and bool(windows) == (name in ("Mistral", "Gemma 3", "GPT-OSS"))


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Mistral", "GPT-OSS"])
def test_packed_sequences_reach_the_kernel_as_cu_seqlens(monkeypatch: pytest.MonkeyPatch, name: str):
    given: dict[str, Any] = models.packed_inputs()
    for options in _seen(monkeypatch, name, **given):
        assert options["cu_seqlens_q"].tolist() == [0, 7, 18, 23] and options["max_seqlen_q"] == 11
        assert options["causal"] is True and "mask" not in options


# torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama 3", "BERT", "Gemma 2"])
def test_a_compiled_model_is_one_graph_with_our_operations(name: str):
    family = BY_NAME[name]
    model: Any = family.build()
    fastattn.hf.patch(model)
    given: dict[str, Any] = dict(models.inputs(family, "right"))
    given.pop("position_ids", None)
    if family.kind == "decoder":
        given["use_cache"] = False
    eager = model(**given)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)(**given)
    tokens = given["attention_mask"].bool()
    torch.testing.assert_close(compiled.logits[tokens], eager.logits[tokens], rtol=1e-4, atol=1e-4)
    names = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert len(graphs) == 1 and "fastattn.attention_fwd.default" in names
    assert any("norm_fwd" in name for name in names)
    assert ("fastattn.rope_qk.default" in names) == (family.kind == "decoder")
    torch._dynamo.reset()
    trained = torch.compile(model, backend="aot_eager")(**given)
    trained.loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    eager.loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_compiled_model_generates_the_same_tokens(cache: str | None):
    family = BY_NAME["Llama 3"]
    model: Any = family.build().eval()
    fastattn.hf.patch(model)
    given = {k: v for k, v in models.inputs(family, "left").items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    eager = model.generate(**given, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(**given, **options), eager)
