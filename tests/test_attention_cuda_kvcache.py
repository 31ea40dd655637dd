"""attention_kvcache in CUDA C++, held to the law: on the GPU where there is one, else in the emulator.

A tile is 128 keys for heads up to 64 and 64 keys for wider ones, so caches of 400 slots make several. Every slot that a
call must not read holds NaN in the keys and infinity in the values.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import law
import pytest
import torch
from caches import OPTIONS, angles, case, on_copies, paged

import fastattn
from fastattn.ops.attention import _cuda_decode, attention_kvcache, reference
from fastattn.ops.attention.kvcache_spec import check_kvcache
from fastattn.runtime import cuda, gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16)
BF16 = torch.bfloat16
NAMES = ("o", "lse", "k_cache", "v_cache")
LONG: dict[str, Any] = {"lengths": (389, 75), "capacity": 400}

pytestmark = pytest.mark.skipif(bool(cuda.objections(DEVICE)), reason="; ".join(cuda.objections(DEVICE)))


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def forced(**kwargs: Any) -> Any:
    return attention_kvcache(**kwargs, backend="cuda")


def holds(tensors: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return law.check(on_copies(forced), on_copies(reference.attention_kvcache), tensors, options, names=NAMES)


def run(tensors: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    return on_copies(forced)(**tensors, **options)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[cuda.Launch]:
    """The launches that a test makes."""
    found: list[cuda.Launch] = []
    original = cuda.run

    def observed(kernel: Any, grid: Any, values: Any, device: Any) -> None:
        found.append(cuda.Launch(kernel, grid, tuple(values)))
        original(kernel, grid, values, device)

    monkeypatch.setattr(cuda, "run", observed)
    return found


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, seqlen_q: int) -> None:
    holds(case(BF16, seqlen_q=seqlen_q, **LONG), **OPTIONS[name](), num_splits=2)


@pytest.mark.parametrize(
    "names", list(itertools.combinations(("left", "softcap", "alibi of each", "sinks"), 2)), ids=str
)
def test_pairs_of_options(names: tuple[str, str]) -> None:
    tensors = paged(case(torch.float16, seqlen_q=2, **LONG), 24)
    holds(tensors, **OPTIONS[names[0]](), **OPTIONS[names[1]]())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [None, 1, 2, 5, 40])
def test_splits(num_splits: int | None, dtype: torch.dtype) -> None:
    """A full cache, an empty one, and lengths that leave splits without keys."""
    holds(case(dtype, lengths=(700, 0, 131), nheads_k=1, capacity=700), num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 7, 16, 128, 256])
def test_paged(block_size: int, dtype: torch.dtype) -> None:
    holds(paged(case(dtype, seqlen_q=2, **LONG), block_size), num_splits=2, window=(300, None))


@pytest.mark.parametrize("heads", [(6, 1), (5, 5), (20, 1), (96, 2)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_heads(heads: tuple[int, int], seqlen_q: int) -> None:
    """MQA, no groups, and more rows than 16, than 64 and than a block has."""
    holds(case(BF16, seqlen_q=seqlen_q, nheads=heads[0], nheads_k=heads[1], lengths=(210, 3), capacity=211))


@pytest.mark.parametrize("headdim, headdim_v", [(8, 40), (80, 16), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("seqlen_q", [1, 17])
def test_head_dimensions(headdim: int, headdim_v: int, seqlen_q: int) -> None:
    """One tile of 16 rows, and blocks of more rows, whose q stays in shared memory when heads are wide."""
    tensors = case(BF16, headdim=headdim, headdim_v=headdim_v, nheads_k=1, new=1, seqlen_q=seqlen_q, **LONG)
    holds(tensors, num_splits=2)


@pytest.mark.parametrize("layout", law.LAYOUTS)
def test_layouts(layout: str) -> None:
    """Caches are read and written where they lie, whatever their strides, which need not be multiples of 16 bytes."""
    new = 0 if layout == "expanded" else 2
    holds(case(BF16, layout=layout, seqlen_q=2, new=new, lengths=(333, 333), capacity=340))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [18, 70])
def test_queries_of_a_prefill(seqlen_q: int, dtype: torch.dtype) -> None:
    """Several tiles of rows and of keys, and queries before the first key."""
    holds(case(dtype, lengths=(5, 30), seqlen_q=seqlen_q, new=seqlen_q, capacity=100), num_splits=2)
    holds(case(dtype, lengths=(140, 180), seqlen_q=seqlen_q, capacity=190), window=(33, None))


@pytest.mark.parametrize("left", [None, 3])
def test_rows_that_see_nothing(left: int | None) -> None:
    """Three queries and one key: the first two see none, which is o = 0 and lse = -inf."""
    found = holds(case(BF16, lengths=(1, 0), seqlen_q=3), num_splits=2, window=(left, None))
    assert (found["o"][0, :2] == 0).all() and (found["lse"][0, :, :2] == -math.inf).all()
    assert (found["o"][1] == 0).all() and (found["lse"][1] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("seqlen_q", [3, 19])
def test_a_key_that_only_later_queries_see(seqlen_q: int, value: float, dtype: torch.dtype) -> None:
    """What the newest key holds must not reach the queries before it, though they share its tile."""
    tensors = case(dtype, seqlen_q=seqlen_q, lengths=(137, 120), capacity=140)
    tensors["v_cache"][0, 136] = value
    tensors["k_cache"][1, 119] = value
    options = [{}, {"softcap": 3.0, "sinks": torch.randn(4), "alibi_slopes": torch.rand(4), "window": (50, None)}]
    for splits, more in itertools.product((1, 2), options):
        found = holds(tensors, num_splits=splits, **more)
        assert found["o"][:, :-1].isfinite().all() and not found["o"][:, -1].isfinite().all()


ROPE = (None, (16, False), (16, True), (6, False), (6, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPE, ids=str)
@pytest.mark.parametrize("block_size", [None, 7])
def test_append(block_size: int | None, rope: tuple[int, bool] | None, dtype: torch.dtype) -> None:
    """The caches hold the bits of the reference in the new slots, and elsewhere those that they had."""
    seqlen_q = 1 if rope is None else 3
    tensors = case(dtype, lengths=(37, 0), new=3, seqlen_q=seqlen_q, headdim=24)
    if block_size:
        tensors = paged(tensors, block_size)
    options: dict[str, Any] = {} if rope is None else {**angles(rope[0]), "interleaved": rope[1]}
    found = holds(tensors, **options)
    expected = on_copies(reference.attention_kvcache)(**tensors, **options)
    for name, cache in zip(NAMES[2:], expected[2:], strict=True):
        assert torch.equal(found[name].view(torch.int16), cache.view(torch.int16)), name
        written = (cache.view(torch.int16) != tensors[name].view(torch.int16)).flatten(2).any(-1)
        assert int(written.sum()) == 6


def test_append_of_many_rows_and_wide_heads() -> None:
    """More rows and heads than one block of the append takes."""
    tensors = case(BF16, lengths=(2, 0), new=7, seqlen_q=7, nheads=33, nheads_k=3, headdim=160, headdim_v=24)
    holds(tensors, **angles(96))


@pytest.mark.parametrize("tables", [("cos", "sin"), ("cos",)], ids=str)
def test_rope_tables_in_the_dtype_of_q(tables: tuple[str, ...]) -> None:
    tensors = case(BF16, new=1)
    holds({**tensors, **angles(16), **{name: angles(16)[name].bfloat16() for name in tables}})


def test_nothing_is_written_outside_of_the_new_slots() -> None:
    """The arguments other than the caches stay as they are."""
    tensors = case(BF16, new=2, seqlen_q=2)
    before = {name: t.clone() for name, t in tensors.items()}
    forced(**tensors, **angles(16))
    for name in ("q", "k", "v", "cache_seqlens"):
        assert torch.equal(tensors[name], before[name]), name


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_sequence_does_not_depend_on_the_batch(num_splits: int, block_size: int | None) -> None:
    """With a given number of splits."""
    tensors = case(BF16, lengths=(437, 5, 480), capacity=480, seqlen_q=2)
    if block_size:
        tensors = paged(tensors, block_size)
    together = run(tensors, num_splits=num_splits)
    shared = ("k_cache", "v_cache") if block_size else ()
    for i in range(3):
        alone = run({n: t if n in shared else t[i : i + 1] for n, t in tensors.items()}, num_splits=num_splits)
        assert torch.equal(together[0][i], alone[0][0]) and torch.equal(together[1][i], alone[1][0])


def test_same_bits_in_every_order_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case(BF16, seqlen_q=3, nheads_k=1, new=3, lengths=(380, 75), capacity=400)
    first = run(tensors, num_splits=3, **angles(16, 400))
    for seed in (1, 2):
        if cuda.emulator is not None:
            monkeypatch.setattr(cuda, "emulator", functools.partial(cuda.emulator, seed=seed))
        again = run(tensors, num_splits=3, **angles(16, 400))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("sizes", [(0, 1, 48), (2, 0, 48), (2, 1, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, capacity = sizes
    tensors = case(BF16, lengths=(0,) * batch, seqlen_q=seqlen_q, capacity=capacity)
    o, lse, *_ = run(tensors, num_splits=2)
    assert o.shape == (batch, seqlen_q, 4, 16) and (o == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_keys_before_the_window_are_not_read(seqlen_q: int, block_size: int | None) -> None:
    lengths, left = (240, 233), 112
    tensors = case(BF16, lengths=lengths, capacity=256, seqlen_q=seqlen_q)
    for i, length in enumerate(lengths):
        for name in ("k_cache", "v_cache"):
            tensors[name][i, : length - seqlen_q - left] = math.nan
    if block_size:
        tensors = paged(tensors, block_size)
    assert holds(tensors, window=(left, None), num_splits=2)["o"].isfinite().all()


def test_lengths_beyond_the_capacity_stay_inside() -> None:
    """On a GPU lengths are not checked: what does not fit is neither written nor read."""
    tensors = case(BF16, lengths=(47, 20), new=1)
    store = torch.zeros(2, 2, 56, 2, 16, dtype=BF16)
    caches = store[0][:, :48], store[1][:, :48]
    lengths, nothing = tensors["cache_seqlens"], (None,) * 5
    more = (tensors["k"], tensors["v"])
    spec = check_kvcache(tensors["q"], *caches, lengths, *more, *nothing, False, None, 0, False, None, None, 1)
    o, lse = torch.zeros(2, 1, 4, 16, dtype=BF16), torch.zeros(2, 4, 1)
    _cuda_decode.kvcache(spec, tensors["q"], *caches, lengths + 4, *more, *nothing, o, lse)
    assert (store[:, :, 48:] == 0).all() and (store[:, 0] == 0).all()
    assert torch.equal(store[1, 1, 24], tensors["v"][1, 0]) and o.isfinite().all()


def test_splits_from_occupancy(monkeypatch: pytest.MonkeyPatch, launched: list[cuda.Launch]) -> None:
    """Where multiprocessors would idle the keys are split, and each sequence decides by its own length how far."""
    monkeypatch.setattr(cuda, "sms", lambda device: 64)
    holds(case(BF16, lengths=(900, 9), nheads_k=1, capacity=1024))
    assert [launch.kernel.name for launch in launched] == ["attention_decode_kernel", "attention_combine_kernel"]
    assert launched[0].grid == (2 * 1024 // 128, 1, 1)


def test_one_split_is_one_launch(launched: list[cuda.Launch]) -> None:
    run(case(BF16, new=1), num_splits=1)
    assert [launch.kernel.name for launch in launched] == ["attention_append_kernel", "attention_decode_kernel"]


@pytest.mark.skipif(DEVICE == "cuda", reason="the tiles of the GPU that is there")
@pytest.mark.parametrize("arch", [80, 86])
def test_tiles_of_smaller_shared_memories(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EMULATED_ARCH", arch)
    for headdim, seqlen_q in ((128, 1), (256, 1), (256, 20)):
        holds(case(BF16, headdim=headdim, seqlen_q=seqlen_q, nheads_k=1, lengths=(300, 75), capacity=310))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_call_has_a_tile(arch: int) -> None:
    """It covers the head dimensions and fits, as often as it says."""
    limit = gpu.shared_limit(arch)
    for headdim, headdim_v, rows in itertools.product((8, 64, 80, 128, 192, 256), (8, 64, 128, 256), (1, 16, 17, 4096)):
        tile = _cuda_decode.find(arch, headdim, headdim_v, rows)
        assert tile is not None and tile.headdim >= headdim and tile.headdim_v >= headdim_v
        assert tile.shared <= limit and tile.per_sm * (tile.shared + 1024) <= limit + 1024
        assert (tile.row_warps == 1) == (rows <= 16)


def test_explain_names_the_tile() -> None:
    found = fastattn.explain(attention_kvcache, **case(BF16), backend="cuda")
    assert found.chosen == "cuda" and str(found.tuning).startswith("decode 16x128")


@pytest.mark.parametrize("dtype, headdim, reason", [(torch.float32, 16, "dtype"), (BF16, 288, "256"), (BF16, 13, "8")])
def test_what_is_left_to_triton(dtype: torch.dtype, headdim: int, reason: str) -> None:
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        forced(**case(dtype, headdim=headdim))


def test_caches_longer_than_32_bit_positions_are_left_to_others() -> None:
    """One slot, shown 2^30 times."""
    tensors = case(BF16, lengths=(5,), capacity=1)
    tensors.update({name: tensors[name].expand(-1, 1 << 30, -1, -1) for name in ("k_cache", "v_cache")})
    found = fastattn.explain(attention_kvcache, **tensors)
    assert found.objections["cuda"] == ("fewer than 1073741824 keys and queries together, got 1073741825",)
