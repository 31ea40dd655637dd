"""Generation with a decoder of our own: prefill and decoding through `KVCache` and `attention_kvcache`.

`Decoder` has the architecture of Llama in forty lines and takes the weights of a transformers model. `generate` serves a
batch of prompts of different lengths, greedily or by temperature, top-k and top-p, with a dynamic, static or paged cache.
The program gives both the same random weights, checks that they write the same greedy tokens as transformers' `generate`
with sdpa, and prints the tokens per second of each. Exit code 1 if a token differs.

    python examples/generate.py [--tokens 64] [--batch 4] [--rounds 5] [--layers 4] [--hidden 256]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastattn
from fastattn.nn import KVCache, RotaryEmbedding


class Decoder(torch.nn.Module):
    """Llama: RMS norm, rotary grouped-query attention, SwiGLU. Weights are those of transformers, q, k, v and gate, up
    each as one matrix."""

    def __init__(self, theirs: LlamaForCausalLM) -> None:
        super().__init__()
        config, layers = theirs.config, theirs.model.layers
        self.heads, self.heads_k = config.num_attention_heads, config.num_key_value_heads
        self.headdim = layers[0].self_attn.head_dim
        self.eps = config.rms_norm_eps
        self.rotary = RotaryEmbedding.from_config(config)
        self.layers = [
            {
                "norm1": layer.input_layernorm.weight,
                "qkv": torch.cat([getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv"]),
                "out": layer.self_attn.o_proj.weight,
                "norm2": layer.post_attention_layernorm.weight,
                "gate_up": torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                "down": layer.mlp.down_proj.weight,
            }
            for layer in layers
        ]
        self.embedding, self.norm, self.head = (
            theirs.model.embed_tokens.weight,
            theirs.model.norm.weight,
            theirs.lm_head.weight,
        )

    @classmethod
    @torch.no_grad()
    def from_llama(cls, theirs: LlamaForCausalLM) -> Decoder:
        return cls(theirs)

    @torch.no_grad()
    def forward(self, tokens: Tensor, cache: KVCache, counts: Sequence[int] | None = None) -> Tensor:
        """Logits [batch, seqlen, vocabulary] after each of tokens [batch, seqlen], which the cache remembers.

        counts  how many tokens of each sequence count; the rest is padding at its end
        """
        stream = F.embedding(tokens, self.embedding)
        h = fastattn.rms_norm(stream, self.layers[0]["norm1"], eps=self.eps)
        cos, sin = self.rotary.tables(max(cache.lengths) + tokens.shape[1])
        following = [layer["norm1"] for layer in self.layers[1:]] + [self.norm]
        sizes = (self.heads, self.heads_k, self.heads_k)
        for i, (layer, next_norm) in enumerate(zip(self.layers, following, strict=True)):
            q, k, v = F.linear(h, layer["qkv"]).unflatten(-1, (-1, self.headdim)).split(sizes, dim=-2)
            o = cache.attend(i, q, k, v, cos=cos, sin=sin)
            branch = F.linear(o.flatten(-2), layer["out"])
            h, stream = fastattn.rms_norm(branch, layer["norm2"], eps=self.eps, residual=stream)
            gate, up = F.linear(h, layer["gate_up"]).chunk(2, dim=-1)
            branch = F.linear(F.silu(gate) * up, layer["down"])
            h, stream = fastattn.rms_norm(branch, next_norm, eps=self.eps, residual=stream)
        cache.advance(tokens.shape[1] if counts is None else counts)
        return F.linear(h, self.head)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of logits [batch, vocabulary]; temperature 0 is greedy.

    top_k keeps the k likeliest tokens, top_p the fewest that together have this probability; None keeps all.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    p, tokens = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k is not None:
        p[:, top_k:] = 0.0
        p /= p.sum(dim=-1, keepdim=True)
    if top_p is not None:
        p[p.cumsum(dim=-1) - p >= top_p] = 0.0
    return tokens.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    count: int,
    cache: KVCache,
    *,
    end: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Up to `count` new tokens for each prompt, ending with `end` if it comes."""
    lengths = [len(p) for p in prompts]
    padded = torch.tensor([[*p, *[0] * (max(lengths) - len(p))] for p in prompts])
    logits = model(padded, cache, lengths)
    last = logits[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
    written: list[Tensor] = []
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    while True:
        tokens = sample(last, temperature, top_k, top_p, generator)
        written.append(tokens)
        if end is not None:
            finished |= tokens == end
        if len(written) == count or bool(finished.all()):
            break
        last = model(tokens[:, None], cache)[:, -1]
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def cache_of(model: Decoder, prompts: Sequence[Sequence[int]], count: int, kind: str) -> KVCache:
    """A cache for these prompts and `count` new tokens: "dynamic", "static" or "paged"."""
    longest, block = max(len(p) for p in prompts) + count, 16
    sizes = {
        "dynamic": {},
        "static": {"capacity": longest},
        "paged": {"block_size": block, "num_blocks": len(prompts) * -(-longest // block)},
    }[kind]
    return KVCache(len(model.layers), len(prompts), model.heads_k, model.headdim, dtype=model.embedding.dtype, **sizes)


def generate_transformers(theirs: LlamaForCausalLM, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The same with transformers: greedy, a dynamic cache, padding at the left."""
    longest = max(len(p) for p in prompts)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        found = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return found[:, longest:].tolist()


def random_llama(hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """A small Llama with random weights, the same every time; its scores are spread so that no two tokens tie."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.15,
        attn_implementation="sdpa",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def seconds_of(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds; the calls take turns, so a busy moment of the machine hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 64), ("batch", 4), ("rounds", 5), ("layers", 4), ("hidden", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    theirs = random_llama(arguments.hidden, arguments.layers)
    ours = Decoder.from_llama(theirs)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 200, (arguments.batch,), generator=generator).tolist()
    prompts = [torch.randint(1, 1000, (n,), generator=generator).tolist() for n in lengths]

    def write(kind: str) -> list[list[int]]:
        return generate(ours, prompts, arguments.tokens, cache_of(ours, prompts, arguments.tokens, kind))

    expected = generate_transformers(theirs, prompts, arguments.tokens)
    kinds = ("dynamic", "static", "paged")
    same = {kind: write(kind) == expected for kind in kinds}
    print(f"prompts of {lengths} tokens, {arguments.tokens} new ones each, greedy, {torch.get_num_threads()} threads")
    calls: dict[str, Callable[[], object]] = {
        "transformers, sdpa": lambda: generate_transformers(theirs, prompts, arguments.tokens)
    }
    calls |= {f"fastattn, {kind}": lambda kind=kind: write(kind) for kind in kinds}  # type: ignore[misc]
    seconds = seconds_of(calls, arguments.rounds)
    base = seconds["transformers, sdpa"]
    for name, median in seconds.items():
        verdict = (
            "" if name not in (f"fastattn, {k}" for k in kinds) else "same tokens" if same[name[10:]] else "DIFFERS"
        )
        rate = arguments.batch * arguments.tokens / median
        print(f"{name:<20}{rate:>10.0f} tokens/s{base / median:>8.2f}x   {verdict}")
    sampled = generate(
        *(ours, prompts[:1], 12, cache_of(ours, prompts[:1], 12, "dynamic")),
        **{"temperature": 0.8, "top_k": 50, "top_p": 0.95, "generator": generator},
    )
    print(f"sampled with temperature 0.8, top-k 50, top-p 0.95: {sampled[0]}")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
