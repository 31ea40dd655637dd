"""`fastattn warmup --model`: the passes of a model, recorded with as few layers and tokens as show every kind of call."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from fastattn.cli import verify_model
from fastattn.cli.verify_model import Wrong

BATCH, TOKENS = 2, 128


def load(name: str, batch_file: str | None, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The patched model and its batch. Not within a recording: patching runs functions to see what they compute."""
    import fastattn.hf

    if importlib.util.find_spec("transformers") is None:
        raise Wrong("transformers must be installed for --model, got no such package")
    if ":" in name:
        model, batch = verify_model.load(name, batch_file)
        model = model.to(dtype)
    else:
        model, batch = _from_configuration(name, dtype)
        batch = verify_model.batch_from_file(batch_file) if batch_file else batch
    batch = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    fastattn.hf.patch(model)
    return model, batch


def run(model: Any, batch: dict[str, Any], *, backward: bool) -> None:
    """The model's passes; the caller records what they launch."""
    if backward:
        model.train()
        _first_tensor(model(**batch)).float().sum().backward()
    model.eval()
    with torch.no_grad():
        _infer(model, batch)


def _infer(model: Any, batch: dict[str, Any]) -> None:
    """A forward pass, the same with padding, and with a cache one more token."""
    done = model(**batch)
    ids = batch.get("input_ids")
    if ids is None:
        return
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 2] = 0
    model(**batch | {"attention_mask": mask})
    kept = getattr(done, "past_key_values", None)
    if kept is not None and not model.config.is_encoder_decoder:
        model(input_ids=ids[:, :1], past_key_values=kept)


def _from_configuration(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Wrong(
            f"--model must be a name or folder that transformers knows, or module:function, got {error}"
        ) from error
    _shorten(config)
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    with torch.device("meta"):
        model = cls(config) if cls is not None else transformers.AutoModel.from_config(config)
    if model.main_input_name != "input_ids":
        raise Wrong(f"--model must read text; for one that reads {model.main_input_name} give module:function")
    model = model.to(dtype).to_empty(device="cpu")  # what the weights hold does not matter
    for buffer in model.buffers():  # indices and frequencies do
        buffer.zero_()
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    return model, {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _shorten(config: Any) -> None:
    """As few layers as have every kind of attention."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        kinds = getattr(part, "layer_types", None)
        keep = max(kinds.index(kind) for kind in kinds) + 1 if kinds else 1
        for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
            if getattr(part, name, None):
                setattr(part, name, keep)
        if kinds:
            part.layer_types = kinds[:keep]


def _first_tensor(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor):
        return outputs
    values = outputs if isinstance(outputs, tuple) else outputs.values()
    return next(v for v in values if isinstance(v, torch.Tensor) and v.requires_grad)
