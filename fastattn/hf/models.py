"""Tiny models with random weights, one per family of the table: what is built, what it is fed, what it can do.

The sizes are small but keep each family's particularities: grouped heads, windows shorter than the sequence, softcap,
sinks, a latent attention whose value heads are narrower than its query heads. All experts of a mixture are active: where
a router chooses some of them, the last bit of a hidden state decides which, and no two programs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

Tensor = torch.Tensor
VOCABULARY = 96


@dataclass(frozen=True)
class Family:
    """One row of the table.

    name      as the table prints it
    build     config keywords -> a model with random weights in train mode, dropout 0 unless the keywords say otherwise
    kind      "decoder" · "encoder" · "encoder-decoder" · "audio" · "image"
    packed    several sequences may lie in one row, told apart by position_ids
    needs     a package besides transformers
    """

    name: str
    build: Callable[..., torch.nn.Module]
    kind: str
    packed: bool = False
    needs: str | None = None


def _model(cls: str, config: str, **sizes: Any) -> Callable[..., torch.nn.Module]:
    def build(**more: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        made = getattr(transformers, config)(**(sizes | more))
        made._attn_implementation = "eager"
        model = getattr(transformers, cls)(made)
        if "num_experts_per_tok" in sizes and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped product knows no float64
        return spread(model)

    return build


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than initialisers give, so that attention is far from uniform and norms are not all ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                wide = "embed" in name or "wte" in name or "wpe" in name or "shared" in name or "relative" in name
                parameter.copy_(noise * (0.7 if wide else 1.3 * fan_in**-0.5))
            else:
                parameter.add_(0.3 * noise)
    return model


_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = _TOKENS | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "attention_dropout": 0.0,
}  # fmt: skip
_ENCODER = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_VISION = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_TOWER = _VISION | {"intermediate_size": 96}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _lora(**more: Any) -> torch.nn.Module:
    import peft

    model = peft.get_peft_model(
        _model("LlamaForCausalLM", "LlamaConfig", **_DECODER)(**more),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


FAMILIES: tuple[Family, ...] = (
    Family(
        "GPT-2",
        _model(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        ),
        "decoder",
        packed=True,
    ),
    Family("BERT", _model("BertForMaskedLM", "BertConfig", **_ENCODER), "encoder"),
    Family("RoBERTa", _model("RobertaForMaskedLM", "RobertaConfig", **(_ENCODER | {"pad_token_id": 1})), "encoder"),
    Family(
        "DistilBERT",
        _model(
            "DistilBertForMaskedLM", "DistilBertConfig", vocab_size=VOCABULARY, max_position_embeddings=128, dim=64,
            hidden_dim=96, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0,
        ),
        "encoder",
    ),
    Family(
        "T5",
        _model(
            "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2,
            num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        ),
        "encoder-decoder",
    ),
    Family(
        "BART",
        _model(
            "BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, d_model=64, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0,
            activation_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
        "encoder-decoder",
    ),
    Family(
        "Llama 2",
        _model("LlamaForCausalLM", "LlamaConfig", **(_DECODER | {"num_key_value_heads": 4})),
        "decoder",
        packed=True,
    ),
    Family("Llama 3", _model("LlamaForCausalLM", "LlamaConfig", **_DECODER, rope_parameters=_LLAMA3), "decoder", True),
    Family("Llama + LoRA", _lora, "decoder", packed=True, needs="peft"),
    Family(
        "Qwen3",
        _model(
            "Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=16, use_sliding_window=True, sliding_window=9,
            max_window_layers=1,
        ),
        "decoder",
        packed=True,
    ),
    Family("Mistral", _model("MistralForCausalLM", "MistralConfig", **_DECODER, sliding_window=9), "decoder", True),
    Family(
        "Gemma 2",
        _model("Gemma2ForCausalLM", "Gemma2Config", **_DECODER, head_dim=16, sliding_window=9, query_pre_attn_scalar=16),
        "decoder",
        packed=True,
    ),
    Family(
        "Gemma 3",
        _model(
            "Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=16, sliding_window=9,
            query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"],
        ),
        "decoder",
        packed=True,
    ),
    Family("DeepSeek-V2", _model("DeepseekV2ForCausalLM", "DeepseekV2Config", **(_DECODER | _LATENT)), "decoder", True),
    Family("DeepSeek-V3", _model("DeepseekV3ForCausalLM", "DeepseekV3Config", **(_DECODER | _LATENT)), "decoder", True),
    Family(
        "GPT-OSS",
        _model(
            "GptOssForCausalLM", "GptOssConfig", **_DECODER, head_dim=16, sliding_window=9, num_local_experts=4,
            num_experts_per_tok=4,
        ),
        "decoder",
        packed=True,
    ),
    Family("Qwen2", _model("Qwen2ForCausalLM", "Qwen2Config", **_DECODER), "decoder", True),
    Family(
        "Phi-3",
        _model("Phi3ForCausalLM", "Phi3Config", **_DECODER, sliding_window=9, resid_pdrop=0.0, embd_pdrop=0.0),
        "decoder",
        packed=True,
    ),
    Family("OLMo 2", _model("Olmo2ForCausalLM", "Olmo2Config", **_DECODER), "decoder", True),
    Family(
        "Granite",
        _model("GraniteForCausalLM", "GraniteConfig", **_DECODER, attention_multiplier=0.2, logits_scaling=2.0),
        "decoder",
        packed=True,
    ),
    Family("StableLM", _model("StableLmForCausalLM", "StableLmConfig", **_DECODER, hidden_dropout=0.0), "decoder", True),
    Family(
        "GPT-NeoX (Pythia)",
        _model("GPTNeoXForCausalLM", "GPTNeoXConfig", **_DECODER, rotary_pct=0.25, hidden_dropout=0.0),
        "decoder",
        packed=True,
    ),
    Family("Cohere", _model("CohereForCausalLM", "CohereConfig", **_DECODER), "decoder", True),
    Family("SmolLM3", _model("SmolLM3ForCausalLM", "SmolLM3Config", **_DECODER, no_rope_layers=[1, 0]), "decoder", True),
    Family(
        "Mixtral",
        _model("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4, num_experts_per_tok=4),
        "decoder",
        packed=True,
    ),
    Family(
        "Llama 4",
        _model(
            "Llama4ForCausalLM", "Llama4TextConfig", **_DECODER, head_dim=16, attention_chunk_size=9,
            intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=2, no_rope_layers=[1, 0],
        ),
        "decoder",
        packed=True,
    ),
    Family(
        "OPT",
        _model(
            "OPTForCausalLM", "OPTConfig", **_TOKENS, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0,
        ),
        "decoder",
    ),
    Family(
        "ModernBERT",
        _model(
            "ModernBertForMaskedLM", "ModernBertConfig", **_TOKENS, hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, local_attention=8,
            global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2,
        ),
        "encoder",
    ),
    Family("ELECTRA", _model("ElectraForMaskedLM", "ElectraConfig", **_ENCODER, embedding_size=32), "encoder"),
    Family(
        "Whisper",
        _model(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCABULARY, d_model=64, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, num_mel_bins=16, max_source_positions=24, max_target_positions=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None, suppress_tokens=None,
            dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        ),
        "audio",
    ),
    Family(
        "ViT",
        _model(
            "ViTForImageClassification", "ViTConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, image_size=32, patch_size=8, num_labels=5, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "image",
    ),
    Family(
        "DINOv2",
        _model("Dinov2ForImageClassification", "Dinov2Config", **_VISION, mlp_ratio=2, num_labels=5),
        "image",
    ),
    Family("CLIP", _model("CLIPForImageClassification", "CLIPConfig", vision_config=_TOWER, num_labels=5), "image"),
    Family("SigLIP", _model("SiglipForImageClassification", "SiglipConfig", vision_config=_TOWER, num_labels=5), "image"),
)  # fmt: skip

SEQLEN = 23


def inputs(family: Family, padding: str = "none", batch: int = 3) -> dict[str, Tensor]:
    """Labelled inputs. padding: "none", "left" or "right": rows of different lengths, labels only on tokens."""
    g = torch.Generator().manual_seed(3)
    if family.kind == "image":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=g), "labels": torch.tensor([0, 3, 1])}
    tokens = torch.randint(3, VOCABULARY, (batch, SEQLEN), generator=g)
    if family.kind == "audio":
        return {"input_features": torch.randn(batch, 16, 48, generator=g), "labels": tokens[:, :13]}
    labels = tokens.clone() if family.kind != "encoder-decoder" else tokens[:, 4:17].clone()
    found = {"input_ids": tokens, "labels": labels}
    if padding != "none":
        lengths = torch.tensor([SEQLEN, 14, 5])[:batch, None]
        column = torch.arange(SEQLEN)
        valid = column < lengths if padding == "right" else column >= SEQLEN - lengths
        found["attention_mask"] = valid.long()
        found["input_ids"] = torch.where(valid, tokens, 0)
        if family.kind != "encoder-decoder":
            found["labels"] = torch.where(valid, labels, -100)
            if padding == "left":  # predicted from padding
                found["labels"][torch.arange(batch), SEQLEN - lengths[:, 0]] = -100
        if family.kind == "decoder":
            found["position_ids"] = (valid.long().cumsum(-1) - 1).clamp(min=0)
    return found


LENGTHS = (7, 11, 5)  # of packed sequences, together SEQLEN


def packed_inputs() -> dict[str, Tensor]:
    """Three sequences in one row, told apart by position_ids alone; no label crosses a boundary."""
    tokens = torch.randint(3, VOCABULARY, (1, SEQLEN), generator=torch.Generator().manual_seed(4))
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return {
        "input_ids": tokens, "position_ids": position_ids, "labels": torch.where(position_ids == 0, -100, tokens),
        "use_cache": False,  # type: ignore[dict-item]
    }  # fmt: skip


def unet() -> torch.nn.Module:
    """Stable Diffusion's UNet in small: residual and cross-attention blocks down, in the middle and up."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    return spread(model)


def unet_inputs() -> tuple[Tensor, Tensor]:
    """Latents [batch, channels, height, width] and text [batch, tokens, channels]."""
    g = torch.Generator().manual_seed(7)
    return torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 9, 24, generator=g)


SENTENCES = [
    "The attention of a query is a weighted mean of the values.",
    "Rivers carve valleys.",
    "A cat sat on the mat and looked at the rain for most of the long afternoon, until the clouds went away.",
    "Python was conceived in the late 1980s.",
]


def pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over a sentence's tokens, normalised: what sentence-transformers makes of the hidden states."""
    weight = attention_mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
