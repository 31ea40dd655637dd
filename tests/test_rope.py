"""fastattn.rope and rope_qk on every backend and instruction set, held to the law; and the table builders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import each
import law
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.ops.rope import reference, rope, rope_qk, tables

ROWS = 50


@pytest.fixture(params=each.WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with each.placed(request.param):
        yield request.param


def layouts(batch: int, seqlen: int, nheads: int, headdim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """x of [batch, seqlen, nheads, headdim], or packed; each a way that models hold it in memory."""
    return {
        "bshd": torch.randn(batch, seqlen, nheads, headdim).to(dtype),
        "bhsd": torch.randn(batch, nheads, seqlen, headdim).to(dtype).transpose(1, 2),
        "qkv": torch.randn(batch, seqlen, 3, nheads, headdim).to(dtype)[:, :, 1],
        "sliced": torch.randn(batch, 2 * seqlen, nheads, headdim + 3).to(dtype)[:, ::2, :, 3:],
        "packed": torch.randn(seqlen, nheads, headdim).to(dtype),
        "expanded": torch.randn(batch, seqlen, 1, headdim).to(dtype).expand(batch, seqlen, nheads, headdim),
    }


LAYOUTS = tuple(layouts(1, 1, 1, 1, torch.float32))


def holds(way: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **options: Any) -> None:
    given = {"x": x, "cos": cos, "sin": sin}
    with each.way(way):
        got = law.check(rope, reference.rope, given, options, wants=("x",), names=("y",))
        with torch.no_grad():
            y = rope(**given, **options)
    assert torch.equal(y, got["y"]) and y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", law.LOW)
@pytest.mark.parametrize(
    ("headdim", "rotary_dim"), [(2, 2), (8, 8), (59, 10), (64, 64), (80, 80), (96, 72), (128, 128), (256, 64)]
)
def test_head_dims(way, headdim, rotary_dim, dtype, interleaved):
    cos, sin = tables.plain(ROWS, rotary_dim)
    for table_dtype in {dtype, torch.float32}:
        x = law.randn(2, 21, 3, headdim, dtype=dtype)
        holds(way, x, cos.to(table_dtype), sin.to(table_dtype), interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(way, layout, interleaved):
    cos, sin = tables.plain(ROWS, 40)
    for dtype in law.LOW:
        holds(way, layouts(2, 37, 3, 48, dtype)[layout], cos, sin, interleaved=interleaved)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batched_table", [False, True])
def test_positions(way, batched_table, id_dtype):
    cos, sin = tables.plain(ROWS, 16)
    if batched_table:
        cos, sin = torch.stack((cos, cos.flip(0))), torch.stack((sin, sin.flip(0)))
    x = law.randn(2, 9, 3, 16)
    for ids in (
        torch.randint(ROWS, (9,)),
        torch.randint(ROWS, (2, 9)),
        torch.randint(ROWS, (1, 9)),
        torch.randint(ROWS, (9, 2)).T,
    ):
        ids = ids.to(id_dtype)
        holds(way, x, cos, sin, position_ids=ids)
        with each.way(way):
            rows = [
                rope(
                    x[b : b + 1], *(t[b] if batched_table else t for t in (cos, sin)), position_ids=ids.expand(2, 9)[b]
                )
                for b in (0, 1)
            ]
            assert torch.equal(rope(x, cos, sin, position_ids=ids), torch.cat(rows))
    holds(way, x, cos, sin)
    packed = law.randn(9, 3, 16)
    holds(
        way,
        packed,
        cos[:1] if batched_table else cos,
        sin[:1] if batched_table else sin,
        position_ids=torch.arange(9).to(id_dtype),
    )


def test_rope_qk_is_rope_of_each(way):
    cos, sin = tables.plain(ROWS, 32)
    ids = torch.randint(ROWS, (2, 9))
    for dtype in law.LOW:
        q = torch.randn(2, 9, 6, 32).to(dtype).requires_grad_()
        k = torch.randn(2, 2, 9, 48).to(dtype).transpose(1, 2).requires_grad_()
        for interleaved in (False, True):
            options = {"interleaved": interleaved, "position_ids": ids}
            with each.way(way):
                pair = rope_qk(q, k, cos, sin, **options)
                alone = rope(q, cos, sin, **options), rope(k, cos, sin, **options)
                grads = [torch.autograd.grad(out, (q, k), [torch.ones_like(o) for o in out]) for out in (pair, alone)]
            assert all(torch.equal(a, b) for a, b in zip((*pair, *grads[0]), (*alone, *grads[1]), strict=True))
            with each.way(way), torch.no_grad():
                assert all(torch.equal(a, b) for a, b in zip(rope_qk(q, k, cos, sin, **options), pair, strict=True))


def test_only_one_of_q_and_k_used(way):
    cos, sin = tables.plain(9, 16)
    q, k = (torch.randn(2, 9, 3, 16, requires_grad=True) for _ in range(2))
    with each.way(way):
        for i in (0, 1):
            used, unused = (q, k) if i == 0 else (k, q)
            found = torch.autograd.grad(rope_qk(q, k, cos, sin)[i].sum(), (used, unused), allow_unused=True)
            expected = torch.autograd.grad(rope(used, cos, sin).sum(), used)[0]
            assert torch.equal(found[0], expected) and (found[1] is None or not found[1].any())


def test_the_inverse_rotation_gives_x_back(way):
    cos, sin = tables.plain(ROWS, 64)
    for interleaved in (False, True):
        x = law.randn(2, 21, 3, 64)
        with each.way(way):
            y = rope(rope(x, cos, sin, interleaved=interleaved), cos, -sin, interleaved=interleaved)
        torch.testing.assert_close(y, x, atol=1e-6, rtol=0)


def test_rotate_half_formula_of_transformers(way):
    def rotate_half(t):
        half = t.shape[-1] // 2
        return torch.cat((-t[..., half:], t[..., :half]), -1)

    cos, sin = tables.plain(11, 64)
    x = law.randn(2, 4, 11, 64)
    wide_cos, wide_sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    with each.way(way):
        y = rope(x.transpose(1, 2), cos, sin).transpose(1, 2)
    torch.testing.assert_close(y, x * wide_cos + rotate_half(x) * wide_sin, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (0, 2, 8)])
def test_empty(way, shape):
    x = torch.randn(shape, requires_grad=True)
    with each.way(way):
        y = rope(x, *tables.plain(5, 8))
        y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape


def test_around_the_cache():
    """Above 24 MB of input and output the stores are non-temporal, above 4 MB of output the memory is huge pages."""
    cos, sin = tables.plain(2048, 128)
    for dtype in law.LOW:
        for x in (torch.randn(1, 2048, 40, 128).to(dtype), torch.randn(1, 40, 2048, 128).to(dtype).transpose(1, 2)):
            for interleaved in (False, True):
                y = rope(x, cos, sin, interleaved=interleaved)
                assert y.stride() == x.stride()
                parts = [
                    rope(x[:, i : i + 256], cos[i:], sin[i:], interleaved=interleaved) for i in range(0, 2048, 256)
                ]
                assert torch.equal(y, torch.cat(parts, 1))


def test_bits_do_not_depend_on_threads():
    x, (cos, sin) = torch.randn(2, 300, 8, 64), tables.plain(300, 64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(rope(x, cos, sin))
    assert all(torch.equal(each.bits(found[0]), each.bits(y)) for y in found[1:])


def test_no_argument_is_written(way):
    x, (cos, sin) = torch.randn(2, 9, 3, 16), tables.plain(9, 16)
    before = [t.clone() for t in (x, cos, sin)]
    leaf = x.requires_grad_()
    dy = torch.ones_like(x)
    with each.way(way):
        torch.autograd.grad(rope(leaf, cos, sin), leaf, dy)
    assert all(torch.equal(a, b) for a, b in zip((x, cos, sin), before, strict=True)) and (dy == 1).all()


def test_gradcheck():
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = tables.plain(9, 8, dtype=torch.float64)
    for interleaved in (False, True):
        call = lambda x, i=interleaved: rope(x, cos, sin, interleaved=i, position_ids=torch.tensor([3, 8, 0, 0, 1]))  # noqa: E731
        assert torch.autograd.gradcheck(call, x)


def _bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    x, (cos, sin) = torch.randn(2, 9, 3, 16), tables.plain(9, 16)
    ids = torch.arange(9)
    base = {"x": x, "cos": cos, "sin": sin}
    return {
        "x": ({**base, "x": 1}, "rope: x must be a torch.Tensor, got int"),
        "cos": ({**base, "cos": None}, "rope: cos must be a torch.Tensor, got NoneType"),
        "dims": ({**base, "x": x[0, 0]}, r"x must be \[batch, seqlen, nheads, headdim\] or packed"),
        "dtype": ({**base, "x": x.int()}, "x must be float32, bfloat16, float16 or float64"),
        "stride": ({**base, "x": x.transpose(2, 3)}, "x must be a tensor with unit last stride"),
        "table dims": ({**base, "cos": cos[0]}, r"cos must be \[seqlen, rotary_dim / 2\] or"),
        "table dtype": ({**base, "cos": cos.half(), "sin": sin.half()}, "cos must be of the dtype of x"),
        "tables differ": ({**base, "sin": sin[:, :7]}, r"sin must be of shape that of cos, \(9, 8\), got \(9, 7\)"),
        "sin dtype": ({**base, "x": x.half(), "sin": sin.half()}, "sin must be of the dtype of cos"),
        "too wide": ({**base, "x": x[..., :14]}, r"cos must be at most headdim / 2 of x \(14 / 2\) wide, got 8"),
        "too short": (
            {**base, "cos": cos[:5], "sin": sin[:5]},
            r"cos must be at least seqlen of x \(9\) rows long, got 5",
        ),
        "batch": (
            {**base, "cos": cos.expand(3, 9, 8), "sin": sin.expand(3, 9, 8)},
            r"cos must be of batch 1 or that of x \(2\), got 3",
        ),
        "table grad": ({**base, "cos": cos.clone().requires_grad_()}, "cos must be a table without gradient"),
        "ids dtype": ({**base, "position_ids": ids.float()}, "position_ids must be int32 or int64"),
        "ids shape": (
            {**base, "position_ids": ids[:8]},
            r"position_ids must be \[seqlen\] or \[batch, seqlen\] of x \(2, 9\)",
        ),
        "ids batch": (
            {**base, "position_ids": ids.expand(3, 9)},
            r"position_ids must be \[seqlen\] or \[batch, seqlen\]",
        ),
        "ids high": (
            {**base, "position_ids": ids + 1},
            r"rope: position_ids must be between 0 and 8 \(cos has 9 rows\), got 9",
        ),
        "ids low": (
            {**base, "position_ids": ids - 1},
            r"position_ids must be between 0 and 8 \(cos has 9 rows\), got -1",
        ),
        "interleaved": ({**base, "interleaved": None}, "interleaved must be True or False"),
    }


@pytest.mark.parametrize("name", _bad_calls())
def test_bad_input(name):
    given, sentence = _bad_calls()[name]
    for backend in (None, "reference"):
        with fastattn.use_backend(backend), pytest.raises(ValueError, match=sentence):
            rope(**given)


def test_bad_pairs():
    q, (cos, sin) = torch.randn(2, 9, 3, 16), tables.plain(9, 16)
    for k, sentence in (
        (q[:1], r"rope_qk: k must be of shape \[batch, seqlen, nheads_k, headdim\] with q's batch and seqlen"),
        (q.half(), "rope_qk: k must be of the dtype of q"),
        (q[..., :8], r"cos must be at most headdim / 2 of k \(8 / 2\) wide"),
        (None, "rope_qk: k must be a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rope_qk(q, k, cos, sin)


def test_explain():
    found = fastattn.explain(rope_qk, torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16), *tables.plain(5, 16))
    assert found.chosen == "cpu" and "half-split rotary_dim 16" in str(found)


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved):
    q, k = (torch.randn(2, 5, n, 16, requires_grad=True) for n in (3, 2))
    ids, (cos, sin) = torch.randint(8, (2, 5)), tables.plain(8, 12)
    torch.library.opcheck(torch.ops.fastattn.rope.default, (q, cos, sin, ids, interleaved, False, None))
    view = torch.randn(2, 3, 5, 16).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.fastattn.rope.default, (view, cos, sin, None, interleaved, True, "reference"))
    torch.library.opcheck(torch.ops.fastattn.rope_qk.default, (q, k, cos, sin, ids, interleaved, False, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    cos, sin = tables.plain(16, 8)

    def block(q, k, ids):
        a, b = rope_qk(q, k, cos, sin, position_ids=ids)
        return (a * rope(b, cos, sin, interleaved=True)).square().sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (5, 9):
        given = [torch.randn(2, seqlen, 3, 8, requires_grad=True) for _ in range(2)]
        ids = torch.randint(16, (2, seqlen))
        expected = torch.autograd.grad(block(*given, ids), given)
        for a, b in zip(expected, torch.autograd.grad(compiled(*given, ids), given), strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 40),
    nheads=st.integers(1, 5),
    half=st.integers(1, 70),
    rest=st.integers(0, 9),
    dtype=st.sampled_from(law.LOW),
    wide_table=st.booleans(),
    interleaved=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    placed=st.booleans(),
    isa=st.sampled_from(each.ISAS or ("baseline",)),
)
def test_fuzz(batch, seqlen, nheads, half, rest, dtype, wide_table, interleaved, layout, placed, isa):
    cos, sin = tables.plain(ROWS, 2 * half, dtype=torch.float32 if wide_table else dtype)
    x = layouts(batch, seqlen, nheads, 2 * half + rest, dtype)[layout]
    ids = torch.randint(ROWS, (seqlen,)) if placed else None
    holds(f"cpu-{isa}", x, cos, sin, interleaved=interleaved, position_ids=ids)


# ---- tables


def _config(rope_type: str, **parameters: Any) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="the tables are checked against transformers, which is not installed"
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=parameters.pop("max_seqlen", 2048),
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **parameters},
    )
    return config, ROPE_INIT_FUNCTIONS[rope_type]


_SHORT, _LONG = [1.0 + i / 64 for i in range(64)], [2.0 + i / 8 for i in range(64)]


@pytest.mark.parametrize("seqlen", [100, 5000])
@pytest.mark.parametrize(
    ("rope_type", "builder", "options", "parameters"),
    [
        ("linear", tables.linear, {"factor": 4.0}, {"factor": 4.0}),
        ("dynamic", tables.dynamic_ntk, {"factor": 2.0, "max_seqlen": 2048}, {"factor": 2.0}),
        (
            "yarn",
            tables.yarn,
            {"factor": 4.0, "original_seqlen": 512},
            {"factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            "yarn",
            tables.yarn,
            {
                "factor": 40.0,
                "original_seqlen": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "truncate": False,
                "beta_fast": 20.0,
            },
            {
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "truncate": False,
                "beta_fast": 20.0,
            },
        ),
        (
            "llama3",
            tables.llama3,
            {"factor": 8.0, "original_seqlen": 512},
            {"factor": 8.0, "original_max_position_embeddings": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
        (
            "longrope",
            tables.longrope,
            {"factor": 4.0, "original_seqlen": 512, "short_factor": _SHORT, "long_factor": _LONG},
            {"factor": 4.0, "original_max_position_embeddings": 512, "short_factor": _SHORT, "long_factor": _LONG},
        ),
    ],
)
def test_tables_are_those_of_transformers(rope_type, builder, options, parameters, seqlen):
    config, initialise = _config(rope_type, **parameters)
    inverse, scaling = initialise(config, torch.device("cpu"), seq_len=seqlen)
    angles = torch.arange(seqlen, dtype=torch.float32)[:, None] * inverse
    cos, sin = builder(seqlen, 128, theta=10000.0, **options)
    assert cos.shape == (seqlen, 64)
    torch.testing.assert_close(cos, angles.cos() * scaling, atol=0, rtol=0)
    torch.testing.assert_close(sin, angles.sin() * scaling, atol=0, rtol=0)


def test_plain_tables():
    cos, sin = tables.plain(7, 6, theta=100.0, dtype=torch.bfloat16)
    assert cos.dtype == torch.bfloat16 and cos[0].tolist() == [1.0] * 3 and sin[0].tolist() == [0.0] * 3
    expected = [math.cos(5 * 100.0 ** (-2 * i / 6)) for i in range(3)]
    torch.testing.assert_close(tables.plain(7, 6, theta=100.0)[0][5], torch.tensor(expected), atol=1e-6, rtol=0)
    for options, sentence in (((5, 7), "rotary_dim must be even"), ((-1, 8), "seqlen must be at least 0")):
        with pytest.raises(ValueError, match=sentence):
            tables.plain(*options)
    with pytest.raises(ValueError, match=r"longrope: long_factor must be rotary_dim / 2 \(4\) numbers, got 3"):
        tables.longrope(5, 8, short_factor=[1] * 4, long_factor=[1] * 3, original_seqlen=4, factor=2)
