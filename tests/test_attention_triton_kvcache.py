"""attention_kvcache in Triton, held to the law: on the GPU where there is one, else in Triton's interpreter.

The interpreter's tiles are 16 rows by 16 keys, so caches of 48 slots make three tiles. Every slot that a call must not
read holds NaN in the keys and infinity in the values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import law
import pytest
import torch
from caches import OPTIONS, angles, case, on_copies, paged

import fastattn
from fastattn.ops.attention import attention_kvcache, reference, tuning
from fastattn.ops.attention.kvcache_spec import check_kvcache
from fastattn.runtime import launch

pytest.importorskip("triton")
from triton import jit
from triton import language as tl

from fastattn.ops.attention import _triton_decode, tuning_decode
from fastattn.ops.attention._triton_decode import _share_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = law.LOW
CAPACITY = 48
NAMES = ("o", "lse", "k_cache", "v_cache")


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def _shares(tiles: int, splits: int, least: int) -> list[tuple[int, int]]:
    """What `_share_of` gives each split."""
    out = torch.full((splits, 2), -1, dtype=torch.int32)
    launch.run(_shares_kernel, (splits,), (out,), (tiles, splits, least), {})
    return [(begin, end) for begin, end in out.tolist()]


@jit(do_not_specialize=["tiles", "splits", "least"])
def _shares_kernel(out_ptr, tiles, splits, least):
    split = tl.program_id(0)
    begin, end = _share_of(split, tiles, splits, least)
    tl.store(out_ptr + 2 * split, begin)
    tl.store(out_ptr + 2 * split + 1, end)


def triton(**kwargs: Any) -> Any:
    return attention_kvcache(**kwargs, backend="triton")


def holds(tensors: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return law.check(
            on_copies(triton), on_copies(reference.attention_kvcache), tensors, options, names=NAMES
        )  # fmt: skip


def run(tensors: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    return on_copies(triton)(**tensors, **options)


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, seqlen_q: int) -> None:
    holds(case(torch.bfloat16, seqlen_q=seqlen_q), **OPTIONS[name](), num_splits=2)


@pytest.mark.parametrize(
    "names", list(itertools.combinations(("left", "softcap", "alibi of each", "sinks"), 2)), ids=str
)
def test_pairs_of_options(names: tuple[str, str]) -> None:
    holds(paged(case(torch.float16, seqlen_q=2), 8), **OPTIONS[names[0]](), **OPTIONS[names[1]]())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [None, 1, 2, 5])
def test_splits(num_splits: int | None, dtype: torch.dtype) -> None:
    """A full cache, an empty one, and lengths that leave splits without keys."""
    holds(case(dtype, lengths=(48, 0, 17), nheads_k=1), num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 7, 16, 32])
def test_paged(block_size: int, dtype: torch.dtype) -> None:
    holds(paged(case(dtype, seqlen_q=2), block_size), num_splits=2, window=(20, None))


@pytest.mark.parametrize("heads", [(6, 1), (5, 5), (20, 1)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_heads(heads: tuple[int, int], seqlen_q: int) -> None:
    """MQA, no groups, and more rows than a tile has."""
    holds(case(torch.bfloat16, seqlen_q=seqlen_q, nheads=heads[0], nheads_k=heads[1], lengths=(21, 3)))


@pytest.mark.parametrize("headdim, headdim_v", [(1, 1), (13, 40), (80, 16), (24, 96), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dimensions(headdim: int, headdim_v: int, dtype: torch.dtype) -> None:
    holds(case(dtype, headdim=headdim, headdim_v=headdim_v, nheads_k=1, new=1), num_splits=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [None, 16])
def test_latent_attention(block_size: int | None, dtype: torch.dtype) -> None:
    """The absorbed form of MLA: 576 and 512 with v the first columns of k, read once."""
    tensors = case(dtype, headdim=576, nheads=8, nheads_k=1, lengths=(37, 5), seqlen_q=2)
    if block_size:
        tensors = paged(tensors, block_size)
    tensors["v_cache"] = tensors["k_cache"][..., :512]
    store = tensors["k_cache"].clone()
    o, lse = triton(**{**tensors, "k_cache": store, "v_cache": store[..., :512]}, return_lse=True)
    apart = triton(**tensors | {"v_cache": tensors["v_cache"].clone()}, return_lse=True)
    assert torch.equal(o, apart[0]) and torch.equal(lse, apart[1])
    plain = reference.attention_kvcache(**tensors, return_lse=True)
    truth = reference.attention_kvcache(
        **{name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}, return_lse=True
    )
    for name, *values in zip(("o", "lse"), (o, lse), plain, truth, strict=True):
        law.compare(name, *values, dtype)


@pytest.mark.parametrize("layout", law.LAYOUTS)
def test_layouts(layout: str) -> None:
    """Caches are read and written where they lie, whatever their strides."""
    tensors = case(torch.bfloat16, layout=layout, seqlen_q=2, new=0 if layout == "expanded" else 2, lengths=(33, 33))
    holds(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_a_prefill(dtype: torch.dtype) -> None:
    """More queries than a tile has rows, several tiles of keys, and queries before the first key."""
    holds(case(dtype, lengths=(5, 30), seqlen_q=18, new=18, nheads=2, nheads_k=1), num_splits=2)


@pytest.mark.parametrize("left", [None, 3])
def test_rows_that_see_nothing(left: int | None) -> None:
    """Three queries and one key: the first two see none, which is o = 0 and lse = -inf."""
    found = holds(case(lengths=(1, 0), seqlen_q=3), num_splits=2, window=(left, None))
    assert (found["o"][0, :2] == 0).all() and (found["lse"][0, :, :2] == -math.inf).all()
    assert (found["o"][1] == 0).all() and (found["lse"][1] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_that_only_later_queries_see(value: float, dtype: torch.dtype) -> None:
    """What the newest key holds must not reach the queries before it, though they share its tile."""
    tensors = case(dtype, seqlen_q=3, lengths=(37, 20))
    tensors["v_cache"][0, 36] = value
    tensors["k_cache"][1, 19] = value
    for splits in (1, 2):
        found = holds(tensors, num_splits=splits)
        assert found["o"][:, :2].isfinite().all() and not found["o"][:, 2].isfinite().all()


ROPE = (None, (16, False), (16, True), (8, False), (8, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPE, ids=str)
@pytest.mark.parametrize("block_size", [None, 7])
def test_append(block_size: int | None, rope: tuple[int, bool] | None, dtype: torch.dtype) -> None:
    """New values lie bit for bit in their slots, so do keys that are not rotated, and nothing else is touched."""
    seqlen_q = 1 if rope is None else 3
    tensors = case(dtype, lengths=(37, 0), new=3, seqlen_q=seqlen_q)
    if block_size:
        tensors = paged(tensors, block_size)
    options: dict[str, Any] = {} if rope is None else {**angles(rope[0]), "interleaved": rope[1]}
    found = holds(tensors, **options)
    expected = on_copies(reference.attention_kvcache)(**tensors, **options)
    assert torch.equal(_bits(found["v_cache"]), _bits(expected[3]))
    written = ~torch.eq(_bits(expected[2]), _bits(tensors["k_cache"])).flatten(2).all(-1)
    assert int(written.sum()) == 6
    same = torch.eq(_bits(found["k_cache"]), _bits(expected[2])).flatten(2).all(-1)
    assert (same | written).all() and (rope is not None or same.all())


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def test_append_of_many_rows_and_wide_heads() -> None:
    """More rows and heads than one program of the append takes."""
    tensors = case(torch.bfloat16, lengths=(2, 0), new=7, seqlen_q=7, nheads=33, nheads_k=3, headdim=160, headdim_v=24)
    holds(tensors, **angles(96))


def test_rope_tables_in_the_dtype_of_q() -> None:
    tensors = case(torch.bfloat16, new=1)
    holds({**tensors, **{name: t.bfloat16() for name, t in angles(16).items()}})


def test_nothing_is_written_outside_of_the_new_slots() -> None:
    """The arguments other than the caches stay as they are."""
    tensors = case(new=2, seqlen_q=2)
    before = {name: t.clone() for name, t in tensors.items()}
    triton(**tensors, **angles(16))
    for name in ("q", "k", "v", "cache_seqlens"):
        assert torch.equal(tensors[name], before[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [None, 8])
def test_one_split_does_not_depend_on_the_batch(block_size: int | None, dtype: torch.dtype) -> None:
    tensors = case(dtype, lengths=(37, 5, 48), seqlen_q=2)
    if block_size:
        tensors = paged(tensors, block_size)
    together = run(tensors, num_splits=1)
    shared = ("k_cache", "v_cache") if block_size else ()
    for i in range(3):
        alone = run({n: t if n in shared else t[i : i + 1] for n, t in tensors.items()}, num_splits=1)
        assert torch.equal(together[0][i], alone[0][0]) and torch.equal(together[1][i], alone[1][0])


def test_splits_of_a_sequence_do_not_depend_on_the_others() -> None:
    one = run(case(lengths=(37, 48), capacity=48), num_splits=3)
    other = run(case(lengths=(37, 0), capacity=48), num_splits=3)
    assert torch.equal(one[0][0], other[0][0]) and torch.equal(one[1][0], other[1][0])


def test_same_bits_every_time() -> None:
    tensors = case(torch.bfloat16, seqlen_q=3, nheads_k=1)
    first, second = (run(tensors, num_splits=4) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("sizes", [(0, 1, 48), (2, 0, 48), (2, 1, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, capacity = sizes
    tensors = case(lengths=(0,) * batch, seqlen_q=seqlen_q, capacity=capacity)
    o, lse, *_ = run(tensors, num_splits=2)
    assert o.shape == (batch, seqlen_q, 4, 16) and (o == 0).all() and (lse == -math.inf).all()


def test_splits_from_occupancy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where multiprocessors would idle the keys are split, and each sequence decides by its own length how far."""
    launched = []
    original = launch.run

    def observed(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        launched.append((kernel, grid))
        original(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(launch, "sms", lambda device: 64)
    monkeypatch.setattr(launch, "run", observed)
    holds(case(torch.bfloat16, lengths=(300, 9), nheads_k=1, capacity=1024))
    assert [kernel for kernel, _ in launched] == [
        _triton_decode.attention_decode_kernel, _triton_decode.attention_combine_kernel
    ]  # fmt: skip
    assert launched[0][1][0] == 2 * 1024 // 128


def test_shares_of_the_keys() -> None:
    """Splits differ by one tile at most, cover the keys once, and have no fewer than the fewest tiles."""
    for tiles, splits, least in itertools.product((0, 1, 9, 100), (1, 3, 8, 40), (1, 8)):
        bounds = _shares(tiles, splits, least)
        used = [(begin, end) for begin, end in bounds if end > begin]
        assert [n for begin, end in used for n in range(begin, end)] == list(range(tiles))
        sizes = [end - begin for begin, end in used]
        assert not sizes or max(sizes) - min(sizes) <= 1
        assert len(sizes) <= 1 or min(sizes) >= least


@pytest.mark.parametrize("programs", [1, 8, 100, 264, 300, 5000])
@pytest.mark.parametrize("capacity", [1, 200, 1000, 8192, 131072])
def test_number_of_splits(programs: int, capacity: int) -> None:
    slots = 264
    n = tuning.splits(programs, capacity, slots)
    assert 1 <= n <= max(1, capacity // 128)
    if programs >= 4 * slots:
        assert n == 1
    if capacity >= 8192 and programs <= slots // 2:
        assert programs * n >= 0.8 * min(slots, programs * (capacity // 128))


@pytest.mark.parametrize("block_size", [None, 8])
def test_keys_before_the_window_are_not_touched(block_size: int | None) -> None:
    lengths, left = (40, 33), 12
    tensors = case(lengths=lengths)
    for i, length in enumerate(lengths):
        for name in ("k_cache", "v_cache"):
            tensors[name][i, : length - 1 - left] = math.nan
    if block_size:
        tensors = paged(tensors, block_size)
    found = holds(tensors, window=(left, None), num_splits=2)
    assert found["o"].isfinite().all()


def test_lengths_beyond_the_capacity_stay_inside() -> None:
    """On a GPU lengths are not checked: what does not fit is neither written nor read."""
    tensors = case(lengths=(47, 20), new=1)
    store = torch.zeros(2, 2, CAPACITY + 8, 2, 16)
    caches = store[0][:, :CAPACITY], store[1][:, :CAPACITY]
    lengths, nothing = tensors["cache_seqlens"], (None,) * 5
    more = (tensors["k"], tensors["v"])
    spec = check_kvcache(tensors["q"], *caches, lengths, *more, *nothing, False, None, 0, False, None, None, 1)
    o, lse = torch.zeros(2, 1, 4, 16), torch.zeros(2, 4, 1)
    _triton_decode.kvcache(spec, tensors["q"], *caches, lengths + 4, *more, *nothing, o, lse)
    assert (store[:, :, CAPACITY:] == 0).all() and (store[:, 0] == 0).all()
    assert torch.equal(store[1, 1, 24], tensors["v"][1, 0]) and o.isfinite().all()


def test_explain_names_the_tile() -> None:
    found = fastattn.explain(attention_kvcache, **case(), backend="triton")
    assert found.chosen == "triton" and str(found.tuning).startswith("decode 16x")


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_call_has_a_row(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row covers the call, and its one-storage tiles serve only such calls."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    choose = tuning_decode.row.__wrapped__
    for width, one_storage, headdim, rows in itertools.product(
        (2, 4), (False, True), (1, 64, 65, 128, 192, 256, 512, 576), (1, 16, 17, 64, 4096)
    ):
        row = choose(arch, width, one_storage, headdim, rows)
        assert row.headdim >= headdim and row.rows >= rows and row.width == width and row.arch <= arch
        assert row.one_storage <= one_storage
        assert row.BLOCK_M <= 16 or rows > 16
