"""RotaryEmbedding beside transformers' own RoPE, and SinusoidalPositionalEncoding beside its formula."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import fastattn
from fastattn.nn import RotaryEmbedding, SinusoidalPositionalEncoding

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import LlamaConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb  # noqa: E402

HEADDIM, LONGEST = 32, 64
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn betas": {"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn mscale": {"factor": 40.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn attention": {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
    "yarn whole": {"factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 500000.0,
    },
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}


def config(name: str, **extra: Any) -> LlamaConfig:
    kind = name.split()[0]
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[name], **extra}
    return LlamaConfig(
        hidden_size=2 * HEADDIM, num_attention_heads=2, max_position_embeddings=LONGEST, rope_parameters=parameters
    )


@pytest.mark.parametrize("seqlen", [1, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_transformers(name: str, seqlen: int) -> None:
    theirs = config(name)
    if name == "default":
        inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[name.split()[0]](theirs, torch.device("cpu"), seq_len=seqlen)
    angles = torch.arange(seqlen).float()[:, None] * inverse
    cos, sin = RotaryEmbedding.from_config(theirs).tables(seqlen)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape and cos.shape[0] >= seqlen
    torch.testing.assert_close(cos[:seqlen], angles.cos() * factor, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin[:seqlen], angles.sin() * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_partial_rotation(name: str) -> None:
    """Half of the head turns, the rest stays; the frequencies are those of the turning part."""
    theirs = config(name, partial_rotary_factor=0.5)
    rotary = RotaryEmbedding.from_config(theirs)
    assert rotary.rotary_dim == HEADDIM // 2
    q, k = torch.randn(2, 20, 4, HEADDIM), torch.randn(2, 20, 2, HEADDIM)
    turned_q, turned_k = rotary(q, k)
    assert torch.equal(turned_q[..., HEADDIM // 2 :], q[..., HEADDIM // 2 :])
    assert torch.equal(turned_k[..., HEADDIM // 2 :], k[..., HEADDIM // 2 :])
    small = RotaryEmbedding(
        HEADDIM // 2, max_seqlen=LONGEST, scaling=theirs.rope_parameters | {"partial_rotary_factor": 1}
    )
    assert torch.equal(turned_q[..., : HEADDIM // 2], small(q[..., : HEADDIM // 2], k[..., : HEADDIM // 2])[0])


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("given", [False, True])
def test_rotation_is_transformers(name: str, given: bool) -> None:
    """Through their module and their apply_rotary_pos_emb, beyond the original length, with and without position_ids."""
    theirs = config(name)
    seqlen = 40
    ids = torch.stack([torch.arange(seqlen), torch.arange(seqlen).flip(0)]) if given else torch.arange(seqlen)[None]
    q, k = torch.randn(2, seqlen, 4, HEADDIM), torch.randn(2, seqlen, 2, HEADDIM)
    cos, sin = LlamaRotaryEmbedding(theirs)(q, ids)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    got = RotaryEmbedding.from_config(theirs)(q, k, ids if given else None)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.transpose(1, 2), e, rtol=1e-5, atol=1e-5)


def test_interleaved_pairs_and_gradients() -> None:
    rotary = RotaryEmbedding(8, interleaved=True)
    q, k = torch.randn(1, 5, 2, 8, requires_grad=True), torch.randn(1, 5, 1, 8)
    cos, sin = rotary.tables(5)
    got = rotary(q, k)
    expected = fastattn.reference.rope_qk(q, k, cos, sin, interleaved=True)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(x[0].square().sum() + x[0].sum(), q) for x in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_tables_are_kept_grow_and_stay_float32() -> None:
    rotary = RotaryEmbedding(8, max_seqlen=16).bfloat16()
    first = rotary.tables(10)
    assert rotary.tables(16)[0] is first[0] and first[0].shape == (16, 4)
    grown = rotary.tables(17)
    assert grown[0].shape == (32, 4) and torch.equal(grown[0][:16], first[0]) and rotary.tables(3)[0] is grown[0]
    assert not rotary.state_dict()
    x = torch.randn(1, 20, 2, 8, dtype=torch.bfloat16)
    for twin in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(twin(x, x)[0], rotary(x, x)[0])


def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    rotary = RotaryEmbedding(8, max_seqlen=16)
    x, ids = torch.randn(2, 5, 2, 8), torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]])
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x), rotary(x, x))
    torch.testing.assert_close(compiled(x, x, ids, seqlen=10), rotary(x, x, ids))


def test_refusals() -> None:
    with pytest.raises(fastattn.UnsupportedError, match=r"rope_type must be one of .*, got 'mrope'"):
        RotaryEmbedding(8, scaling={"rope_type": "mrope"})
    with pytest.raises(ValueError, match=r"scaling\['factor'\] must be given with rope_type 'linear'"):
        RotaryEmbedding(8, scaling={"rope_type": "linear"})
    with pytest.raises(ValueError, match=r"short_factor must be rotary_dim / 2 \(4\) numbers"):
        RotaryEmbedding(8, scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_in_words(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=layout)
    with pytest.raises(ValueError, match="q must be a plain tensor"):
        RotaryEmbedding(8)(nested, nested)


# ---- sinusoids


@pytest.mark.parametrize("d_model", [2, 7, 16])
def test_sinusoids_are_the_papers(d_model: int) -> None:
    encoding = SinusoidalPositionalEncoding(d_model, max_seqlen=50, batch_first=True)
    table = encoding(torch.zeros(1, 50, d_model))[0]
    for m in (0, 1, 7, 49):
        for i in range(d_model):
            angle = m / 10000 ** (2 * (i // 2) / d_model)
            assert table[m, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


def test_sinusoids_in_every_layout() -> None:
    x = torch.randn(2, 5, 6)
    encoding = SinusoidalPositionalEncoding(6, max_seqlen=9, batch_first=True)
    y = encoding(x)
    torch.testing.assert_close(SinusoidalPositionalEncoding(6)(x.transpose(0, 1)).transpose(0, 1), y)
    torch.testing.assert_close(encoding(x[0]), y[0])
    torch.testing.assert_close(encoding(x[:, 3:], offset=3), y[:, 3:])
    assert encoding(x.bfloat16()).dtype == torch.bfloat16 and not encoding.state_dict()
    assert torch.equal(SinusoidalPositionalEncoding(6, dropout=0.5, batch_first=True).eval()(x), y)
    assert (SinusoidalPositionalEncoding(6, dropout=0.5, batch_first=True)(x) == 0).any()
    with pytest.raises(ValueError, match=r"x must be at most max_seqlen \(9\) positions long, got 10"):
        encoding(x, offset=5)
    with pytest.raises(ValueError, match=r"x must be of d_model \(6\) features, got 5"):
        encoding(x[..., :5])
