"""Train a classifier from scratch: which library's documentation is a sentence from, Python's, NumPy's or PyTorch's?

A BERT-like encoder (4 layers, 128 wide) reads padded sentences out of the installed packages' docstrings. It is trained
twice in turns, with torch's SDPA and with fastattn; prints both loss curves, the accuracy on held-out sentences and the
speed ratio. Exit code 1 if the curves differ by more than float32's noise, or if nothing was learnt.

    python examples/classifier.py [--steps 150] [--quick]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from loss_curves import LIBRARIES, library_sentences, race
from torch import Tensor, nn
from transformers import BertConfig, BertModel, logging
from transformers.modeling_outputs import SequenceClassifierOutput

BATCH, WORDS, LONGEST = 24, 3000, 48
PAD, UNKNOWN, START = 0, 1, 2


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def vocabulary(texts: list[str]) -> dict[str, int]:
    """The most frequent words, without the libraries' names, which would give the answer away."""
    counts = Counter(word for text in texts for word in words(text))
    for name in ("numpy", "torch", "pytorch", "python", "np"):
        del counts[name]
    return {word: i for i, (word, _) in enumerate(counts.most_common(WORDS), 3)}


def encode(texts: list[str], labels: list[int], known: dict[str, int]) -> dict[str, Tensor]:
    """A padded batch: input_ids and attention_mask [batch, longest], labels [batch]."""
    rows = [[START, *(known.get(word, UNKNOWN) for word in words(text)[: LONGEST - 1])] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor(labels)}


class Classifier(nn.Module):
    """The mean of an encoder's hidden states over a sentence's words, and a linear layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * weight).sum(1) / weight.sum(1))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--quick", action="store_true", help="a few steps of a smaller model, for tests")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    steps = 12 if arguments.quick else arguments.steps

    texts, labels = library_sentences(80 if arguments.quick else 900)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    held_out = len(texts) // 6
    known = vocabulary(texts[held_out:])
    print(f"{len(texts)} sentences, {held_out} held out, {len(known)} words; for example {texts[0]!r}\n")

    def batches() -> Iterator[dict[str, Tensor]]:
        g = torch.Generator().manual_seed(1)
        while True:
            chosen = (held_out + torch.randint(len(texts) - held_out, (BATCH,), generator=g)).tolist()
            yield encode([texts[i] for i in chosen], [labels[i] for i in chosen], known)

    torch.manual_seed(0)
    layers, width = (2, 64) if arguments.quick else (4, 128)
    config = BertConfig(
        vocab_size=WORDS + 3, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=LONGEST, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=len(LIBRARIES), attn_implementation="sdpa",
    )  # fmt: skip
    found, model = race(
        Classifier(config),
        batches(),
        steps,
        min(steps, 10),
        lambda m: torch.optim.AdamW(m.parameters(), lr=5e-4),
    )
    found.report()

    model.eval()
    with torch.inference_mode():
        batch = encode(texts[:held_out], labels[:held_out], known)
        right = model(**batch).logits.argmax(-1) == batch["labels"]
    print(f"{float(right.float().mean()):.0%} of the held-out sentences are right (guessing: {1 / len(LIBRARIES):.0%})")
    if not found.lawful():
        print("classifier: the loss curves differ by more than float32's noise", file=sys.stderr)
        return 1
    learnt = found.losses["fastattn"][-1] < found.losses["fastattn"][0]
    if not learnt:
        print("classifier: the loss did not fall", file=sys.stderr)
    return 0 if learnt else 1


if __name__ == "__main__":
    sys.exit(main())
