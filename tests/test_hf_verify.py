"""`fastattn verify --model`: what it prints, where it says that the difference grows, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers.utils import logging

from fastattn.cli import main
from fastattn.hf import layerwise, models, norms
from fastattn.hf.law import law

logging.set_verbosity_error()
BY_NAME = {family.name: family for family in models.FAMILIES}
PROGRAM = """
from fastattn.hf import models
FAMILY = {family.name: family for family in models.FAMILIES}["Llama 3"]
def model():
    return FAMILY.build()
def with_batch():
    batch = models.inputs(FAMILY, "left")
    del batch["labels"]
    return FAMILY.build(), batch
def nonsense():
    return 3
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_for_verify.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made_for_verify", raising=False)
    return tmp_path


def test_a_function_with_its_batch(program: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", "made_for_verify:with_batch"]) == 0
    text = capsys.readouterr().out
    assert "LlamaAttention  2      replaced  fastattn.attention" in text
    assert "model.layers.1" in text and "the model's output is lawful" in text


def test_a_batch_from_a_file_and_another_dtype(program: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"input_ids": torch.arange(3, 15)[None]}, "batch.pt")
    (program / "batch.json").write_text(json.dumps({"input_ids": [list(range(3, 15))]}))
    for batch in ("batch.pt", "batch.json"):
        command = ["verify", "--model", "made_for_verify:model", "--batch", batch, "--dtype", "bf16", "--json"]
        assert main(command) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert rows[-1]["path"] == "(model)" and rows[-1]["lawful"]
        assert 1e-4 < rows[-1]["eager"] < 1e-1


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    BY_NAME["BERT"].build().save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    assert main(["verify", "--model", str(tmp_path / "bert")]) == 2
    assert "--batch must be given" in capsys.readouterr().err
    torch.save({"input_ids": torch.arange(3, 15)[None]}, tmp_path / "batch.pt")
    assert main(["verify", "--model", str(tmp_path / "bert"), "--batch", str(tmp_path / "batch.pt")]) == 0
    assert "BertForMaskedLM" in capsys.readouterr().out


def test_where_the_difference_grows(program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    honest = norms.rms_norm_forward

    def wrong(module: torch.nn.Module, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        y = honest(module, hidden_states, **options)
        return y * 1.001 if module is guilty else y

    model, batch = BY_NAME["Llama 3"].build(), models.inputs(BY_NAME["Llama 3"], "left")
    del batch["labels"]
    guilty = model.model.layers[1].post_attention_layernorm  # type: ignore[union-attr]
    monkeypatch.setattr(norms, "rms_norm_forward", wrong)
    layers, report = layerwise.compare(model, batch)
    first = next(layer for layer in layers if not layer.lawful)
    assert first.path == "model.layers.1.post_attention_layernorm" and first.ratio > 100
    assert not layers[-1].lawful and layers[-1].path == "(model)"
    assert report.replaced("norm") == 5 and not [m for m in model.modules() if "forward" in vars(m)]
    monkeypatch.setattr(norms, "rms_norm_forward", lambda m, x, **o: honest(m, x, **o) * 1.001)
    assert main(["verify", "--model", "made_for_verify:with_batch"]) == 1
    text = capsys.readouterr().out
    assert "GROWS HERE" in text and "the model's output is BROKEN" in text


def test_only_tokens_are_compared():
    family = BY_NAME["Llama 3"]
    given = models.inputs(family, "left")
    del given["labels"]
    layers, _ = layerwise.compare(family.build(), given)
    assert all(layer.lawful for layer in layers)
    padded = layerwise._outputs(family.build().eval(), given, given["attention_mask"])
    assert padded["model.layers.0"].shape == (int(given["attention_mask"].sum()), 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere"), "--model must be a folder or module:function, got 'nowhere'"),
        (("--model", "no_such_module:f"), "an importable module:function"),
        (("--model", "made_for_verify:missing"), "an importable module:function"),
        (("--model", "made_for_verify:nonsense"), "must return an nn.Module"),
        (("--model", "made_for_verify:model"), "--batch must be given"),
        (("--model", "made_for_verify:model", "--batch", "none.pt"), "--batch must be a .json or a torch.save file"),
        (("--model", "made_for_verify:model", "--batch", "list.json"), "--batch must be a .json or a torch.save file"),
        (("--model", "made_for_verify:model", "--batch", "list.pt"), "--batch must hold a dict of tensors, got list"),
        (("--model", "."), "a folder that transformers can load"),
    ],
)
def test_bad_arguments_exit_with_2(
    program: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
):
    (program / "list.json").write_text("[1]")
    torch.save([1], "list.pt")
    assert main(["verify", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_gradient_that_is_zero_is_judged_beside_the_largest_and_covers_no_other():
    def noisy(size: float, zero: float) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(7)
        sizes = {"logits": 1e-7, "d steep": size, "d zero": zero}
        return {k: (x + sizes[k] * torch.randn(x.shape, generator=noise)).float() for k, x in truth.items()}

    draw = torch.Generator().manual_seed(6)
    truth = {k: torch.randn(128, generator=draw, dtype=torch.float64) for k in ("logits", "d steep", "d zero")}
    truth["d zero"] *= 1e-20
    plain = noisy(1e-7, 1e-12)
    assert law(noisy(1e-7, 4e-12), plain, truth)[1] == ""
    assert "the gradients' RMS" in law(noisy(1e-3, 1e-12), plain, truth)[1]
    assert "d zero" in law(noisy(1e-7, 1e-3), plain, truth)[1]
