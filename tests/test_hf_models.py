"""Every Hugging Face family of the table keeps the law; what would break it is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers.utils import logging

import fastattn.hf
from fastattn.cli import main
from fastattn.hf import attention, models, table
from fastattn.hf.models import FAMILIES

logging.set_verbosity_error()
logging.disable_progress_bar()
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_NAME)
def test_family_keeps_the_law(name: str):
    if BY_NAME[name].needs:
        pytest.importorskip(BY_NAME[name].needs)
    findings = list(table.examine(BY_NAME[name]))
    assert len(findings) == 11
    assert not [f for f in findings if f.status not in ("ok", "absent")]
    assert sum(f.status == "ok" for f in findings) >= 3


@pytest.mark.parametrize("dtype", table.DTYPES)
def test_unet_cross_attention_keeps_the_law(dtype: str):
    pytest.importorskip("diffusers")
    finding = table.unet(dtype)
    assert finding.status == "ok", finding


def test_real_weights_embed_the_same():
    finding = table.minilm()
    if finding.status == "absent":
        pytest.skip(finding.reason)
    assert finding.status == "ok", finding


def test_every_family_of_the_issue_is_there():
    wanted = ["GPT-2", "BERT", "RoBERTa", "DistilBERT", "T5", "BART", "Qwen3", "Mistral", "GPT-OSS", "Whisper", "ViT"]
    wanted += ["Llama 2", "Llama 3", "Llama + LoRA", "Gemma 2", "Gemma 3", "DeepSeek-V2", "DeepSeek-V3"]
    assert set(wanted) <= set(BY_NAME) and len(BY_NAME) == len(models.FAMILIES)


def test_checkpointing_really_computes_twice(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    honest = fastattn.attention

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return honest(*args, **kwargs)

    monkeypatch.setattr(fastattn, "attention", counting)
    assert table.checkpointing(BY_NAME["Llama 2"]).status == "ok"
    assert len(calls) == 2 + 4  # two layers, once without and twice with checkpointing


# a table that cannot fail proves nothing


def _broken_by(monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> None:
    honest = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *a, **options: honest(*a, **(options | wrong)))


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Gemma 2", "ViT"])
@pytest.mark.parametrize("dtype", table.DTYPES)
def test_a_wrong_scale_is_found(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str):
    _broken_by(monkeypatch, scale=0.24)
    assert table.numbers(BY_NAME[name], "none", dtype).status == "BROKEN"


@pytest.mark.parametrize(("name", "padding"), [("BERT", "right"), ("Llama 3", "left"), ("BART", "right")])
def test_forgotten_padding_is_found(monkeypatch: pytest.MonkeyPatch, name: str, padding: str):
    _broken_by(monkeypatch, mask=None)
    assert table.numbers(BY_NAME[name], padding, "fp32").status == "BROKEN"


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma 3", "GPT-OSS"])
def test_a_forgotten_window_is_found(monkeypatch: pytest.MonkeyPatch, name: str):
    _broken_by(monkeypatch, window=None)
    assert table.numbers(BY_NAME[name], "none", "fp32").status == "BROKEN"


def test_a_forgotten_softcap_sink_or_bias_is_found(monkeypatch: pytest.MonkeyPatch):
    for name, option in (("Gemma 2", "softcap"), ("GPT-OSS", "sinks"), ("T5", "bias")):
        if not fastattn.hf.patch(BY_NAME[name].build()).replaced("attention"):
            continue  # T5 has an attention of its own before transformers 5.15
        with monkeypatch.context() as patched:
            _broken_by(patched, **{option: None})
            assert table.numbers(BY_NAME[name], "none", "fp32").status == "BROKEN", name


def test_packed_sequences_that_see_each_other_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_restarts", lambda *_: None)
    assert table.packed(BY_NAME["GPT-OSS"], "fp32").status == "BROKEN"  # its mask says nothing of positions
    assert table.packed(BY_NAME["Llama 3"], "fp32").status == "ok"
    monkeypatch.setattr(attention.CompactMask, "packed", lambda self: None)
    assert table.packed(BY_NAME["Llama 3"], "fp32").status == "BROKEN"


def test_a_family_whose_package_is_missing_is_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    findings = list(table.examine(BY_NAME["Llama + LoRA"]))
    assert {f.status for f in findings} == {"absent"} and {f.reason for f in findings} == {"peft is not installed"}
    assert table.unet("fp32").status == table.minilm().status == "absent"


def test_the_float64_run_is_float64_to_the_end():
    family = BY_NAME["Llama 3"]
    model = family.build().double()
    given = models.inputs(family)
    with table.float64(), torch.no_grad():
        exact = model(**given).logits
    assert exact.dtype == torch.float64
    with torch.no_grad():
        narrow = model(**given).logits.double()  # norms cast to float32 on the way
    assert 1e-9 < float((exact - narrow).abs().max()) < 1e-3


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]):
    assert main(["hf-table", "--family", "ViT"]) == 0
    captured = capsys.readouterr()
    assert "| ViT | fp32 | " in captured.out and "| ViT | bf16 | " in captured.out
    assert "11 checks, 0 broken" in captured.err
    assert main(["hf-table", "--family", "nonsense"]) == 2


def test_command_fails_when_a_family_breaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    _broken_by(monkeypatch, scale=0.24)
    assert main(["hf-table", "--family", "ViT"]) == 1
    captured = capsys.readouterr()
    assert "BROKEN" in captured.out and "* ViT, no padding: error of" in captured.out
