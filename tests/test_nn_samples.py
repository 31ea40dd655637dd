"""PyTorch's own module samples (module_db), run through fastattn.nn: MHA, transformer layers and containers, norms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import twins
from torch.testing._internal.common_modules import module_db

import fastattn.nn

NAMES = {
    "MultiheadAttention": 64,
    "TransformerEncoderLayer": 35,
    "TransformerDecoderLayer": 67,
    "TransformerEncoder": 35,
    "Transformer": 64,
    "LayerNorm": 7,
    "RMSNorm": 6,
}


def samples(name: str, training: bool) -> list[Any]:
    [info] = [i for i in module_db if i.module_cls.__name__ == name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on its own samples
        found = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training)
    assert len(found) >= NAMES[name]
    return found


def build(name: str, sample: Any, training: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's, equally initialised."""
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    torch.manual_seed(0)
    torchs = getattr(torch.nn, name)(*args, **kwargs)
    if hasattr(fastattn.nn, name):
        torch.manual_seed(0)
        ours = getattr(fastattn.nn, name)(*args, **kwargs)
        for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(a, b)
        assert repr(ours) == repr(torchs) and isinstance(ours, type(torchs))
    else:
        ours = fastattn.nn.from_torch(copy.deepcopy(torchs))
        assert any(type(m).__module__.startswith("fastattn.nn") for m in ours.modules())
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for module in (ours, torchs):
        twins.without_dropout(module).train(training)
    return ours, torchs


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # nested tensors, masks of two kinds: torch's words about its samples
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_module_samples(name: str, training: bool) -> None:
    """Outputs and gradients under the law, with torch's own reference function where it has one; then without grad."""
    for sample in samples(name, training):
        ours, torchs = build(name, sample, training)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twins.check(ours, torchs, *args, **kwargs)
            found = ours(*args, **kwargs)
            if sample.reference_fn is not None:
                expected = sample.reference_fn(ours, *args, **kwargs)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(ours(*args, **kwargs), torchs(*args, **kwargs), rtol=1e-3, atol=1e-4)
