"""Train a character GPT from scratch on Python's own manual, sample from it, and compare with plain PyTorch.

The text is `pydoc_data.topics`, part of every Python. The same model is built from torch.nn and from fastattn.nn, starts
from the same weights and sees the same batches in turns; the losses are printed side by side. Training amplifies rounding
step by step, so the curves are held to the law where it can be told apart from chaos: over the first steps a third model
trains in float64, and fastattn's losses may be at most twice as far from its as plain PyTorch's are. After the compared
steps fastattn trains on alone. Then the text that it writes, and the ratio of the times. Exit code 1 if the law is broken.

    python examples/char_gpt.py [--steps 1200] [--compared 100] [--context 128] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn.nn

PLAIN, OURS, TRUTH = "torch.nn", "fastattn.nn", "float64"


class CharGPT(torch.nn.Module):
    """Decoder-only, pre-norm, learned positions; `layers` is fastattn.nn or torch.nn."""

    def __init__(self, vocabulary: int, context: int, d_model: int, nhead: int, depth: int, layers: ModuleType) -> None:
        super().__init__()
        self.context = context
        self.tokens = torch.nn.Embedding(vocabulary, d_model)
        self.positions = torch.nn.Embedding(context, d_model)
        self.layers = torch.nn.ModuleList(
            layers.TransformerEncoderLayer(
                d_model, nhead, 4 * d_model, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = layers.LayerNorm(d_model)
        self.head = torch.nn.Linear(d_model, vocabulary, bias=False)
        self.register_buffer("future", torch.ones(context, context, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seqlen, vocabulary] of the character after each of tokens [batch, seqlen]."""
        seqlen = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:seqlen]
        mask = self.future[:seqlen, :seqlen]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))

    @torch.no_grad()
    def write(self, tokens: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """`count` sampled characters after tokens [seqlen]."""
        for _ in range(count):
            logits = self(tokens[None, -self.context :])[0, -1] / temperature
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)])
        return tokens


@dataclass
class Run:
    """One model in training."""

    model: CharGPT
    steps: int
    schedule: int  # the steps over which the learning rate falls, the same for all
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, tokens: Tensor) -> None:
        """tokens [batch, context + 1]"""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = 2e-3 * min((len(self.losses) + 1) / 50, 1.0, 1.1 - len(self.losses) / self.schedule)
        loss = F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())


def text() -> str:
    """Python's manual, plain ASCII."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()


def train(data: Tensor, vocabulary: int, sizes: dict[str, int], steps: dict[str, int], batch: int) -> dict[str, Run]:
    """The runs, by name, each of its own number of steps."""
    runs = {}
    for name, count in steps.items():
        torch.manual_seed(0)
        model = CharGPT(vocabulary, layers=fastattn.nn if name == OURS else torch.nn, **sizes)
        runs[name] = Run(model.double() if name == TRUTH else model, count, max(steps.values()))
    generator = torch.Generator().manual_seed(1)
    for step in range(max(steps.values())):
        starts = torch.randint(len(data) - sizes["context"] - 1, (batch,), generator=generator).tolist()
        tokens = torch.stack([data[s : s + sizes["context"] + 1] for s in starts])
        for run in list(runs.values())[:: 1 if step % 2 else -1]:
            if step < run.steps:
                run.step(tokens)
    return runs


def distances(runs: dict[str, Run]) -> dict[str, float]:
    """How far the first losses of each lie from those in float64, at most."""
    truth = runs[TRUTH].losses
    return {name: max(abs(a - b) for a, b in zip(runs[name].losses, truth, strict=False)) for name in (PLAIN, OURS)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--compared", type=int, default=100, help="steps that torch.nn trains too")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="a few small steps, to see that it works")
    options = parser.parse_args(arguments)
    sizes = {"context": options.context, "d_model": 128, "nhead": 4, "depth": 3}
    steps, compared, batch, length = options.steps, min(options.compared, options.steps), 4, 400
    if options.quick:
        sizes = {"context": 64, "d_model": 32, "nhead": 2, "depth": 2}
        steps, compared, batch, length = 45, 40, 8, 60

    corpus = text()
    alphabet = sorted(set(corpus))
    data = torch.tensor([alphabet.index(c) for c in corpus])
    print(
        f"{len(corpus)} characters of Python's manual, {len(alphabet)} different ones, {torch.get_num_threads()} threads"
    )
    checked = min(8, compared)
    runs = train(data, len(alphabet), sizes, {PLAIN: compared, OURS: steps, TRUTH: checked}, batch)

    print(f"{'step':>6}{PLAIN:>14}{OURS:>14}")
    for step in sorted(
        {
            *range(0, compared, max(1, compared // 8)),
            compared - 1,
            *range(compared, steps, max(1, steps // 6)),
            steps - 1,
        }
    ):
        plain = f"{runs[PLAIN].losses[step]:>14.4f}" if step < compared else " " * 14
        print(f"{step:>6}{plain}{runs[OURS].losses[step]:>14.4f}")
    far = distances(runs)
    print(f"largest distance from float64 over {checked} steps: {PLAIN} {far[PLAIN]:.1e}, {OURS} {far[OURS]:.1e}")
    medians = {name: statistics.median(runs[name].seconds[:compared]) for name in (PLAIN, OURS)}
    print(f"a step takes {1e3 * medians[OURS]:.0f} ms, {medians[PLAIN] / medians[OURS]:.2f}x the speed of {PLAIN}\n")
    start = torch.tensor([alphabet.index(c) for c in "The "])
    written = runs[OURS].model.eval().write(start, length, 0.7, torch.Generator().manual_seed(0))
    print("".join(alphabet[i] for i in written.tolist()))
    if far[OURS] > 2 * far[PLAIN] + 4 * torch.finfo(torch.float32).eps * max(runs[TRUTH].losses):
        print("char_gpt: the loss is further from float64 than the law allows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
