"""The Transformer of Vaswani et al. (arXiv:1706.03762) from fastattn.nn, and a toy task that shows it learning.

Encoder and decoder, sinusoidal positions, tied embeddings, label smoothing and the paper's learning rate schedule. The
task: read a sequence of 4 to 12 symbols and write it backwards. The same model built from torch.nn starts from the same
weights and sees the same batches; the two losses are printed side by side, then the share of sequences that greedy
decoding gets right and the ratio of the times.

    python examples/transformer.py [--steps 600]
"""

from __future__ import annotations

import argparse
import sys
import time
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn.nn

PAD, BEGIN, END, SYMBOLS = 0, 1, 2, 26


class Transformer(torch.nn.Module):
    """Sequence to sequence; `layers` is fastattn.nn or torch.nn.

    vocabulary  number of tokens; token 0 is padding
    d_model, nhead, depth, d_ff, dropout  as in the paper
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int = 64,
        nhead: int = 4,
        depth: int = 2,
        d_ff: int = 256,
        dropout: float = 0.0,
        layers: ModuleType = fastattn.nn,
    ) -> None:
        super().__init__()
        options = {"dim_feedforward": d_ff, "dropout": dropout, "batch_first": True}
        self.embedding = torch.nn.Embedding(vocabulary, d_model)
        self.positions = fastattn.nn.SinusoidalPositionalEncoding(d_model, dropout=dropout, batch_first=True)
        self.encoder = torch.nn.ModuleList(
            layers.TransformerEncoderLayer(d_model, nhead, **options) for _ in range(depth)
        )
        self.decoder = torch.nn.ModuleList(
            layers.TransformerDecoderLayer(d_model, nhead, **options) for _ in range(depth)
        )
        torch.nn.init.normal_(self.embedding.weight, std=d_model**-0.5)

    def encode(self, source: Tensor, padding: Tensor) -> Tensor:
        """[batch, seqlen] tokens to [batch, seqlen, d_model]; padding is True where a token is to be ignored."""
        x = self._embed(source)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=padding)
        return x

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Logits [batch, seqlen, vocabulary] of the token after each of target's; padding is that of the memory."""
        x = self._embed(target)
        future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=future, tgt_is_causal=True, memory_key_padding_mask=padding)
        return x @ self.embedding.weight.T

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = source == PAD
        return self.decode(target, self.encode(source, padding), padding)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.positions(self.embedding(tokens) * self.embedding.embedding_dim**0.5)

    @torch.no_grad()
    def greedy(self, source: Tensor, longest: int) -> Tensor:
        """The likeliest next token, again and again: [batch, longest]."""
        padding = source == PAD
        memory = self.encode(source, padding)
        target = torch.full((len(source), 1), BEGIN)
        for _ in range(longest):
            likeliest = self.decode(target, memory, padding)[:, -1].argmax(-1, keepdim=True)
            target = torch.cat([target, likeliest], dim=1)
        return target[:, 1:]


def loss_of(model: Transformer, source: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of every token after the first, smoothed as in the paper; padding does not count."""
    logits = model(source, target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.1)


def batch_of(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random sequences and themselves backwards, both padded at the end."""
    lengths = torch.randint(4, 13, (size,), generator=generator)
    source, target = torch.zeros(size, 12, dtype=torch.long), torch.zeros(size, 14, dtype=torch.long)
    for i, n in enumerate(lengths.tolist()):
        symbols = torch.randint(3, 3 + SYMBOLS, (n,), generator=generator)
        source[i, :n] = symbols
        target[i, : n + 2] = torch.cat([torch.tensor([BEGIN]), symbols.flip(0), torch.tensor([END])])
    return source, target


def optimizer_of(model: Transformer, warmup: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Adam and the schedule of section 5.3, at a fifth of its height: the model is small."""
    optimizer = torch.optim.Adam(
        model.parameters(), lr=0.2 * model.embedding.embedding_dim**-0.5, betas=(0.9, 0.98), eps=1e-9
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) ** -0.5, (n + 1) * warmup**-1.5))
    return optimizer, schedule


def train(models: dict[str, Transformer], steps: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The models take turns at every batch. Losses by step, and seconds in all."""
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)
    optimizers = {name: optimizer_of(model, max(1, steps // 4)) for name, model in models.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        source, target = batch_of(32, generator)
        for name in list(models)[:: 1 if step % 2 else -1]:
            started = time.perf_counter()
            optimizer, schedule = optimizers[name]
            loss = loss_of(models[name], source, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds[name] += time.perf_counter() - started
            losses[name].append(loss.item())
    return losses, seconds


def accuracy(model: Transformer) -> float:
    """The share of new sequences that greedy decoding writes backwards without a mistake."""
    source, target = batch_of(200, torch.Generator().manual_seed(2))
    written = model.greedy(source, 13)
    expected = target[:, 1:]
    return float(((written == expected) | (expected == PAD)).all(dim=1).float().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    models = {}
    for name, layers in (("torch.nn", torch.nn), ("fastattn.nn", fastattn.nn)):
        torch.manual_seed(0)
        models[name] = Transformer(3 + SYMBOLS, layers=layers)
    losses, seconds = train(models, arguments.steps)
    print(f"{'step':>6}" + "".join(f"{name:>14}" for name in models))
    for step in sorted({*range(0, arguments.steps, max(1, arguments.steps // 8)), arguments.steps - 1}):
        print(f"{step:>6}" + "".join(f"{losses[name][step]:>14.4f}" for name in models))
    for name, model in models.items():
        print(f"{name}: {accuracy(model.eval()):.0%} of 200 new sequences reversed, {seconds[name]:.1f} s")
    print(f"speed: {seconds['torch.nn'] / seconds['fastattn.nn']:.2f}x that of torch.nn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
