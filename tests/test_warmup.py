"""`fastattn warmup`: what calls and models need is compiled for a GPU that is not here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn import cli
from fastattn.ops import _dispatch
from fastattn.runtime import cache, cuda, env, jit

if jit.error() is not None:
    pytest.skip(jit.error() or "", allow_module_level=True)
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_hidden_layers": 40,
    "vocab_size": 32,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTATTN_CUDA_CACHE", str(tmp_path / "cache"))  # for processes of its own
    cache.folder.cache_clear()
    yield tmp_path / "cache"
    cache.folder.cache_clear()


def _lines(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[str]:
    assert cli.main(["warmup", *arguments]) == code
    return capsys.readouterr().out.splitlines()


def test_it_fills_the_cache_once(folder: Path, capsys):
    arguments = ("--arch", "sm_90a", "--op", "rms_norm", "--hidden", "256", "--inference", "--jobs", "1")
    *kernels, total = _lines(capsys, *arguments)
    assert kernels and all(line.startswith("norm_fwd_kernel<bf16") and line.endswith(" s") for line in kernels)
    assert total.startswith(f"{len(kernels)} of {len(kernels)} kernels are in {folder}")
    assert {entry.name.rsplit("-", 1)[0] for entry in folder.iterdir()} == {"norm_fwd_kernel-sm_90a"}
    again = _lines(capsys, *arguments)[:-1]
    assert [line.rsplit(":", 1) for line in again] == [[line.rsplit(":", 1)[0], " was there"] for line in kernels]


def test_a_recorded_launch_finds_what_was_compiled_ahead(folder: Path, capsys, monkeypatch):
    _lines(capsys, "--arch", "sm_80", "--op", "rms_norm", "--hidden", "256", "--inference", "--jobs", "1")
    with cuda.recording(80) as recorded, fastattn.use_backend("cuda"):
        fastattn.rms_norm(torch.empty(4096, 256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.bfloat16))
    (launch,) = recorded.launches
    monkeypatch.setattr(jit, "compile", None)
    assert jit.load(launch.kernel, "sm_80").image.startswith(b"\x7fELF")


def test_it_compiles_in_several_processes(folder: Path, capsys):
    arguments = ("--arch", "80", "sm_90a", "--op", "rms_norm", "--hidden", "256", "--inference", "--jobs", "2")
    *kernels, total = _lines(capsys, *arguments)
    assert len(kernels) >= 2 and all(line.endswith(" s") for line in kernels) and total.startswith(f"{len(kernels)} of")
    assert len(list(folder.iterdir())) == len(kernels)


def test_the_backward_and_every_dtype_asked_for_are_among_them(folder: Path, capsys):
    lines = _lines(capsys, "--arch", "90", "--op", "rms_norm", "--dtype", "bf16", "fp16", "--list")
    assert {line.split("<")[0] for line in lines} >= {"norm_fwd_kernel", "norm_bwd_kernel"}
    assert {line.split("<")[1][:3] for line in lines if line.startswith("norm_fwd")} == {"bf1", "f16"}
    assert len(lines) == len(set(lines)) and not folder.exists()


def test_a_model_of_transformers_is_recorded_from_its_configuration(folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    lines = _lines(capsys, "--arch", "sm_80", "--model", str(tmp_path), "--inference", "--list")
    assert {line.split("_")[0] for line in lines} >= {"attention", "norm", "rope"}
    assert any(line.startswith("rope_kernel<bf16") for line in lines), "the model's rotation was not recognised"
    assert all(line.endswith(" sm_80") for line in lines) and not folder.exists()


def _block() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    norm = fastattn.nn.RMSNorm(96)
    return norm, {"x": torch.randn(4, 96)}


def test_a_model_of_the_users_own_is_recorded(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "block_of_the_test", SimpleNamespace(build=_block))
    lines = _lines(capsys, "--arch", "sm_80", "--model", "block_of_the_test:build", "--dtype", "fp16", "--list")
    assert {line.split("<")[0] for line in lines} >= {"norm_fwd_kernel", "norm_bwd_kernel"}
    assert all("f16" in line and line.endswith(" sm_80") for line in lines if line.startswith("norm_fwd"))


def test_a_call_that_the_kernels_refuse_is_reported_and_the_rest_goes_on():
    with cuda.recording(90) as recorded, _dispatch.collecting_refusals() as refusals, fastattn.use_backend("cuda"):
        fastattn.rms_norm(torch.ones(2, 8, dtype=torch.float64))
        fastattn.rms_norm(torch.empty(2, 8))
    assert len(recorded.launches) == 1
    (refusal,) = refusals
    assert refusal.startswith("rms_norm: backend 'cuda' does not take this call")
    with pytest.raises(fastattn.UnsupportedError), cuda.recording(90), fastattn.use_backend("cuda"):
        fastattn.rms_norm(torch.ones(2, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--arch", "sm_75"], "not older than sm_80, got 'sm_75'"),
        (["--arch", "hopper"], "such as sm_90a"),
        (["--arch", "90", "--model", "no/such/folder"], "--model must be a name or folder"),
        (["--arch", "90", "--model", "no_such_module:f"], "importable module:function"),
        (["--arch", "90", "--batch", "batch.json"], "--batch serves --model"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, words):
    assert cli.main(["warmup", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_a_gpu_the_architecture_must_be_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["warmup"]) == 2
    assert "--arch must be given" in capsys.readouterr().err


def test_without_a_cache_there_is_nothing_to_fill(capsys, monkeypatch):
    monkeypatch.setattr(env, "CUDA_CACHE", "off")
    assert cli.main(["warmup", "--arch", "90", "--op", "rope", "--inference"]) == 1
    assert "no cache to fill" in capsys.readouterr().err
