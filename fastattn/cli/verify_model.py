"""`fastattn verify --model`: a model of the user's, layer by layer, on the user's batch."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastattn.benchmarks.case import DTYPES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
BLOCK_PARENTS = ("layers", "layer", "h", "block", "blocks")


class Wrong(ValueError):
    """The arguments cannot be used; exit code 2."""


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        print("verify: transformers must be installed for --model, got no such package", file=sys.stderr)
        return 2
    from transformers.utils import logging

    from fastattn.hf import layerwise

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, batch = load(arguments.model, arguments.batch)
    except Wrong as wrong:
        print(f"verify: {wrong}", file=sys.stderr)
        return 2
    if arguments.dtype:
        model = model.to(DTYPES[arguments.dtype[0]])
        batch = {k: v.to(DTYPES[arguments.dtype[0]]) if _floating(v) else v for k, v in batch.items()}
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    layers, report = layerwise.compare(model, batch)
    last = layers[-1]
    grown = [layer for layer in layers if not layer.lawful]
    if arguments.json:
        for layer in layers:
            print(json.dumps(vars(layer) | {"ratio": layer.ratio, "lawful": layer.lawful}))
        return 0 if last.lawful else 1
    print(report)
    shown = [x for x in layers if not x.lawful or x is last or _is_block(x.path)]
    width = max(len(x.path) for x in shown)
    print(f"\n{'output of':<{width}}  {'module':<24}  {'error':>9}  {'eager':>9}  {'ratio':>6}")
    for x in shown:
        line = f"{x.path:<{width}}  {x.module:<24}  {x.ours:>9.2e}  {x.eager:>9.2e}  {x.ratio:>6.2f}"
        print(line if x.lawful else f"{line}  GROWS HERE" if x is grown[0] else f"{line}  above the law")
    verdict = "lawful" if last.lawful else "BROKEN"
    print(f"\n{len(layers)} outputs against float64, relative RMS errors; the model's output is {verdict}")
    if grown and last.lawful:
        print(f"the first of {len(grown)} outputs above twice eager's error is {grown[0].path}; it does not last")
    return 0 if last.lawful else 1


def load(name: str, batch: str | None) -> tuple[Any, dict[str, Any]]:
    """The model and the batch of `--model` and `--batch`."""
    if Path(name).is_dir():
        model, given = _from_folder(name)
    elif ":" in name:
        model, given = _from_function(name)
    else:
        raise Wrong(f"--model must be a folder or module:function, got {name!r}")
    if batch is not None:
        given = batch_from_file(batch)
    if given is None:
        raise Wrong("--batch must be given: neither a tokenizer in the folder nor the function provides one")
    return model, given


def _from_folder(name: str) -> tuple[torch.nn.Module, dict[str, Any] | None]:
    import transformers

    from fastattn.hf.models import SENTENCES

    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model = cls.from_pretrained(name, attn_implementation="eager", local_files_only=True)
    except (OSError, ValueError) as error:
        raise Wrong(f"--model must be a folder that transformers can load, got {error}") from error
    if not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
        return model, None
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
    padding = bool(tokenizer.pad_token)
    texts = SENTENCES if padding else SENTENCES[:1]
    return model, dict(tokenizer(texts, padding=padding, return_tensors="pt"))


def _from_function(name: str) -> tuple[torch.nn.Module, dict[str, Any] | None]:
    module, function = name.split(":", 1)
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise Wrong(f"--model must be an importable module:function, got {name!r} ({error})") from error
    finally:
        sys.path.pop(0)
    model, batch = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, torch.nn.Module) or not isinstance(batch, (Mapping, type(None))):
        raise Wrong(f"--model must return an nn.Module, or it and a dict, got {type(made).__name__}")
    return model, None if batch is None else dict(batch)


def batch_from_file(name: str) -> dict[str, Any]:
    """What `--batch` names."""
    try:
        if name.endswith(".json"):
            batch = {k: torch.tensor(v) for k, v in json.loads(Path(name).read_text()).items()}
        else:
            batch = torch.load(name, weights_only=True)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise Wrong(f"--batch must be a .json or a torch.save file of a dict of tensors, got {error}") from error
    if not isinstance(batch, dict):
        raise Wrong(f"--batch must hold a dict of tensors, got {type(batch).__name__}")
    return batch


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_block(path: str) -> bool:
    parts = path.split(".")
    return len(parts) >= 2 and parts[-1].isdigit() and parts[-2] in BLOCK_PARENTS
