"""`patch` changes one model object, says what it did, and `unpatch` takes it back."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import law
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers.utils import logging

import fastattn
import fastattn.hf
from fastattn.hf import models, norms, rotary

Tensor = torch.Tensor
logging.set_verbosity_error()
BY_NAME = {family.name: family for family in models.FAMILIES}
X = {"input_ids": torch.arange(3, 20)[None]}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**X).logits


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Gemma 2", "DeepSeek-V3"])
def test_another_model_of_the_class_keeps_its_bits_and_unpatch_restores(name: str):
    model, other = BY_NAME[name].build().eval(), BY_NAME[name].build().eval()
    before, state = logits(other), {k: v.clone() for k, v in model.state_dict().items()}
    fastattn.hf.patch(model)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(other), before)
    fastattn.hf.unpatch(model)
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(state)
    assert not [m for m in model.modules() if "forward" in vars(m) or any("fastattn" in k for k in vars(m))]


def test_models_that_share_a_config_object_do_not_share_the_patch():
    torch.manual_seed(0)
    config = BY_NAME["Llama 3"].build().config
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    assert first.config is second.config
    before = logits(second)
    fastattn.hf.patch(first)
    assert first.config._attn_implementation == "fastattn" and first.config is not config
    assert first.model.layers[0].self_attn.config is first.config
    assert second.config._attn_implementation == config._attn_implementation == "eager"
    assert torch.equal(logits(second), before)
    fastattn.hf.unpatch(first)
    assert first.config is config and first.model.layers[0].self_attn.config is config


def test_parts_can_be_chosen_and_added():
    model = BY_NAME["Llama 3"].build()
    report = fastattn.hf.patch(model, attention=False, rope=False)
    assert [report.replaced(p) for p in ("attention", "norm", "rope")] == [0, 5, 0]
    assert model.config._attn_implementation == "eager"
    report = fastattn.hf.patch(model)
    assert [report.replaced(p) for p in ("attention", "norm", "rope")] == [2, 0, 2]
    fastattn.hf.unpatch(model)
    assert model.config._attn_implementation == "eager"
    fastattn.hf.unpatch(model)


def test_the_report_is_a_table():
    report = fastattn.hf.patch(BY_NAME["GPT-OSS"].build())
    lines = str(report).splitlines()
    assert lines[0] == "fastattn in GptOssForCausalLM:"
    assert any(line.split()[:4] == ["norm", "GptOssRMSNorm", "5", "replaced"] and '"last"' in line for line in lines)
    assert not report.kept()
    assert "nothing to replace" in str(fastattn.hf.patch(nn.Linear(2, 2)))


def test_patch_wants_a_module():
    with pytest.raises(TypeError, match=r"patch: model must be an nn\.Module, got str"):
        fastattn.hf.patch("model")  # type: ignore[arg-type]


def test_copies_and_pickles_of_a_patched_model_are_patched():
    model = BY_NAME["Llama 3"].build().eval()
    norms_only = BY_NAME["BERT"].build().eval()
    fastattn.hf.patch(model)
    fastattn.hf.patch(norms_only)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert not torch.equal(logits(twin), logits(model))  # the twin's norm reads the twin's weight
    fastattn.hf.unpatch(twin)
    assert twin.config._attn_implementation == "eager" and "forward" not in vars(twin.model.norm)
    again = pickle.loads(pickle.dumps(norms_only))
    assert torch.equal(logits(again), logits(norms_only))


def test_models_inside_other_modules_are_found():
    wrapped = nn.ModuleDict({"encoder": BY_NAME["BERT"].build(), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 2)})
    report = fastattn.hf.patch(wrapped)
    assert report.replaced("attention") == 2 and report.replaced("norm") == 7
    fastattn.hf.unpatch(wrapped)
    assert wrapped["encoder"].config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_forwards_of_other_libraries_are_left_alone():
    model: Any = BY_NAME["Llama 3"].build()
    norm = model.model.norm
    theirs = norm.forward = functools.partial(type(norm).forward, norm)
    report = fastattn.hf.patch(model)
    (row,) = report.kept()
    assert row.part == "norm" and row.first == "model.norm" and "another library" in row.detail
    fastattn.hf.unpatch(model)
    assert norm.forward is theirs
    norm.forward = type(norm).forward.__get__(norm)  # the class's own, bound
    assert not fastattn.hf.patch(model).kept()


def test_a_model_without_the_interface_is_reported():
    config = transformers.GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
        intermediate_size=64,
    )
    model = transformers.GPTNeoForCausalLM(config).eval()
    before = logits(model)
    report = fastattn.hf.patch(model, norms=False)
    assert report.replaced("attention") == 0
    assert "does not go through AttentionInterface" in report.kept()[0].detail
    assert torch.equal(logits(model), before)


# norms


class Llama(nn.Module):
    """A norm that its name does not give away."""

    rounding = "llama"

    def __init__(self, columns: int = 48, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(columns)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LastNorm(Llama):
    rounding = "last"

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).to(x.dtype)


class GemmaNorm(Llama):
    rounding = "gemma"

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).to(
            x.dtype
        )


class NarrowNorm(Llama):
    """Statistics in the input's dtype: no rounding of ours."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class MeanNorm(Llama):
    """Centred: not an RMS norm."""

    def forward(self, x):
        centred = x.float() - x.float().mean(-1, keepdim=True)
        return self.weight * (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class HeadsNorm(Llama):
    """Normalises heads, and takes nothing else (xLSTM)."""

    def forward(self, x):
        _batch, _rows, _heads, _columns = x.shape
        return super().forward(x)


class WeightlessNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-6
        self.register_buffer("weight", torch.full((7,), 3.0))

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class OtherEpsNorm(Llama):
    """Its eps is not the one it shows."""

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 10 * self.eps)).to(x.dtype)


class GatedNorm(Llama):
    def forward(self, x, gate=None):
        return super().forward(x)


class LlamaNorm(Llama):
    pass


@pytest.mark.parametrize("cls", [LlamaNorm, LastNorm, GemmaNorm])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rounding_is_found_by_running_the_module(cls: type[Llama], eps: float, dtype: torch.dtype):
    module = cls(eps=eps).to(dtype)
    before = module.weight.clone()
    found = norms.replacement(module)
    assert found is not None and found[0] is not None and found[1] == f'fastattn.rms_norm, rounding="{cls.rounding}"'
    assert torch.equal(module.weight, before)
    x = torch.randn(7, 48).to(dtype)
    torch.testing.assert_close(found[0](x), module(x))


@pytest.mark.parametrize("module", [LlamaNorm(), LastNorm(), GemmaNorm(), nn.LayerNorm(48)])
def test_nearly_all_bits_of_a_norm_in_bf16_are_the_modules_own(module: nn.Module):
    module = module.bfloat16()
    with torch.no_grad():
        module.weight.copy_(torch.randn(48))  # type: ignore[union-attr,operator]
        x = torch.randn(500, 48).bfloat16()
        found = norms.replacement(module)
        assert found is not None and found[0] is not None
        assert float((found[0](x) == module(x)).float().mean()) > 0.99


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (NarrowNorm(), "fit none of the formulas"),
        (MeanNorm(), "fit none of the formulas"),
        (OtherEpsNorm(), "fit none of the formulas"),
        (GatedNorm(), "takes 2 arguments"),
        (nn.utils.parametrizations.weight_norm(LlamaNorm(), dim=None), "has modules inside"),
        (nn.RMSNorm(16), "eps must be a float"),
        (HeadsNorm(), "fit none of the formulas"),
        (nn.BatchNorm1d(16), "has parameters besides one weight"),
        (nn.LayerNorm((4, 8)), "normalises 2 axes"),
        (type("MyLayerNorm", (nn.LayerNorm,), {"forward": lambda self, x: x})(8), "a forward of its own"),
    ],
)
def test_norms_of_other_formulas_are_kept_and_named(module: nn.Module, words: str):
    found = norms.replacement(module)
    assert found is not None and found[0] is None and words in found[1]


def test_torch_rms_norm_and_modules_that_are_no_norms():
    found = norms.replacement(nn.RMSNorm(48, eps=1e-6))
    assert found is not None and found[1] == 'fastattn.rms_norm, rounding="last"'
    assert norms.replacement(nn.Linear(4, 4)) is None and norms.replacement(nn.Sequential()) is None


def test_norms_without_a_parameter():
    """Their width is the module's own, and a buffer called weight takes no part (FalconMamba)."""
    x = torch.randn(3, 24)
    for module in (nn.RMSNorm(24, eps=1e-6, elementwise_affine=False), WeightlessNorm()):
        found = norms.replacement(module)
        assert found is not None and found[0] is not None
        torch.testing.assert_close(found[0](x), module(x))


def test_mixed_dtypes_run_the_models_own_forward():
    x = torch.randn(3, 48).bfloat16()
    for module in (LlamaNorm(), LastNorm(), nn.LayerNorm(48)):
        found = norms.replacement(module)
        assert found is not None and found[0] is not None
        assert torch.equal(found[0](x), module(x)) and found[0](x).dtype == module(x).dtype


def test_norms_take_any_strides():
    x = torch.randn(2, 48, 5).transpose(1, 2)
    for module in (LlamaNorm(), nn.LayerNorm(48)):
        found = norms.replacement(module)
        assert found is not None and found[0] is not None
        torch.testing.assert_close(found[0](x), module(x))


# rope


def _functions() -> dict[str, Any]:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
    from transformers.models.glm import modeling_glm as glm
    from transformers.models.gpt_oss import modeling_gpt_oss as oss
    from transformers.models.llama import modeling_llama as llama

    return {
        "half-split": llama.apply_rotary_pos_emb,
        "half-split, half tables": oss.apply_rotary_pos_emb,
        "deinterleaved": v3.apply_rotary_pos_emb_interleave,
        "interleaved, full tables": glm.apply_rotary_pos_emb,
        "interleaved, complex table": v2.apply_rotary_emb,
    }


@pytest.mark.parametrize("kind", list(rotary._KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_recognised_and_equal(kind: str, dtype: torch.dtype):
    function = _functions()[kind]
    assert rotary.recognise(function) == kind
    g = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(2, h, 6, 32, generator=g).to(dtype) for name, h in (("q", 4), ("k", 2))}
    angles = torch.rand(1, 6, 16, generator=g)
    tensors |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}

    def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        if "complex" in kind:
            return (torch.complex(cos.float(), sin.float()),)
        return (cos, sin) if "half tables" in kind else (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return rotary._KINDS[kind](function, q, k, *tables(cos, sin))

    def theirs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return function(q, k, *tables(cos, sin))

    law.check(ours, theirs, tensors, wants=("q", "k"), names=("q_rotated", "k_rotated"))


def test_other_layouts_and_mixed_dtypes():
    function = _functions()["half-split"]
    q, k = torch.randn(2, 6, 4, 16), torch.randn(2, 6, 2, 16)
    angles = torch.rand(2, 6, 8).repeat(1, 1, 2)
    given = (q, k, angles.cos(), angles.sin())
    for ours, theirs in zip(
        rotary.half_split(function, *given, unsqueeze_dim=2), function(*given, unsqueeze_dim=2), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    mixed = (q.transpose(1, 2).bfloat16(), k.transpose(1, 2).bfloat16(), *given[2:])
    for ours, theirs in zip(rotary.half_split(function, *mixed), function(*mixed), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32


def test_functions_that_are_no_rotation_of_ours_are_not_recognised():
    def reflected(q, k, cos, sin, unsqueeze_dim=1):
        return _functions()["half-split"](q, k, cos, -sin)

    def three(q, k, cos, sin):
        return q, k, cos

    assert rotary.recognise(reflected) is None and rotary.recognise(three) is None


def test_tables_with_different_halves_keep_the_models_rope():
    model: Any = BY_NAME["Llama 3"].build()

    class OddRotaryEmbedding(nn.Module):
        def forward(self, x, position_ids):
            angles = position_ids[..., None] * torch.arange(16.0)
            return angles.cos(), angles.sin()

    model.model.rotary_emb = OddRotaryEmbedding()
    report = fastattn.hf.patch(model)
    assert (
        report.replaced("rope") == 0 and "halves of the tables of OddRotaryEmbedding differ" in report.kept()[0].detail
    )

    class FailingRotaryEmbedding(nn.Module):
        def forward(self, x, position_ids):
            raise KeyError("full_attention")

    model.model.rotary_emb = FailingRotaryEmbedding()
    fastattn.hf.unpatch(model)
    assert "could not be checked (KeyError" in fastattn.hf.patch(model).kept()[0].detail
    model.model.rotary_emb = nn.Identity()
    fastattn.hf.unpatch(model)
    report = fastattn.hf.patch(model)
    assert "no rotary embedding was found" in report.kept()[0].detail
