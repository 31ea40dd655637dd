"""What a call of attention_kvcache must be; the companion of spec.py for caches, block tables and lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastattn.ops._check import fail, floating, is_tensor, number, same_device, same_dtype, shape, unit_last_stride
from fastattn.ops.attention.spec import check_index, check_sinks, check_slopes, has_data

Tensor = torch.Tensor
OP = "attention_kvcache"


class KVCacheSpec(NamedTuple):
    """One validated call; the names that AttentionSpec has mean the same."""

    dtype: torch.dtype
    device: str
    batch: int
    nheads: int
    nheads_k: int
    seqlen_q: int
    seqlen_k: int  # what the cache can hold per sequence
    headdim: int
    headdim_v: int
    left: int | None
    right: int | None
    upper_left: bool
    scale: float
    softcap: float | None
    alibi: bool
    sinks: bool
    seqlen_new: int  # keys appended by the call, 0 without k
    block_size: int | None  # None: not paged
    rotary_dim: int | None  # None: no RoPE
    interleaved: bool
    num_splits: int | None
    dropout_p: float = 0.0


def check_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    interleaved: bool,
    left: int | None,
    right: int | None,
    upper_left: bool,
    scale: float | None,
    softcap: float | None,
    num_splits: int | None,
) -> KVCacheSpec:
    """The specification of a call; ValueError in the user's words when it is wrong."""
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_rows(name, t, q)
        if t.dim() != 4:
            paged = name != "q" and block_table is not None
            layout = "[num_blocks, block_size, nheads_k, headdim]" if paged else "[batch, seqlen, nheads, headdim]"
            fail(OP, name, layout, f"shape {tuple(t.shape)}")
    floating(OP, "q", q)
    batch, seqlen_q, nheads, headdim = q.shape
    blocks, slots, nheads_k, _ = k_cache.shape
    headdim_v = v_cache.shape[3]
    if k_cache.shape[3] != headdim:
        fail(OP, "k_cache", f"of the headdim of q ({headdim})", k_cache.shape[3])
    if v_cache.shape[:3] != k_cache.shape[:3]:
        expected = tuple(k_cache.shape[:3])
        fail(OP, "v_cache", f"of the first three sizes of k_cache {expected}", tuple(v_cache.shape[:3]))
    if nheads_k == 0 or nheads == 0 or nheads % nheads_k != 0:
        fail(OP, "k_cache", f"a tensor whose nheads_k divides the nheads of q ({nheads})", nheads_k)
    if headdim == 0 or headdim_v == 0:
        fail(OP, "q" if headdim == 0 else "v_cache", "a tensor with headdim > 0", 0)
    capacity = _check_block_table(block_table, batch, blocks, slots, q.device)
    if block_table is None and blocks != batch:
        fail(OP, "k_cache", f"of the batch size of q ({batch})", blocks)
    seqlen_new = _check_new(k, v, batch, nheads_k, headdim, headdim_v, q)
    if seqlen_new:
        _check_writable(k_cache, v_cache)
    _check_seqlens(cache_seqlens, batch, seqlen_new, capacity, q.device)
    if block_table is not None and batch * seqlen_new > 1 and has_data(block_table) and has_data(cache_seqlens):
        _check_slots(block_table, cache_seqlens.tolist(), seqlen_new, slots)
    rotary_dim = _check_rope(cos, sin, k, cache_seqlens, q)
    if scale is None:
        scale = headdim**-0.5
    else:
        number(OP, "scale", scale)
    if softcap is not None:
        number(OP, "softcap", softcap, low=0.0)
    if num_splits is not None and not isinstance(num_splits, (int, torch.SymInt)):
        fail(OP, "num_splits", "None (chosen by length) or an integer", num_splits)
    if num_splits is not None and num_splits < 1:
        fail(OP, "num_splits", "None (chosen by length) or at least 1", num_splits)
    if alibi_slopes is not None:
        check_slopes(OP, alibi_slopes, batch, nheads, q.device)
    if sinks is not None:
        check_sinks(OP, sinks, nheads, q.device, q.dtype)
    if torch.is_grad_enabled():
        tensors = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "sinks": sinks}
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                fail(OP, name, "without gradient (a cache is for inference: use torch.no_grad())", "requires_grad=True")
    return KVCacheSpec(
        q.dtype, q.device.type, batch, nheads, nheads_k, seqlen_q, capacity, headdim, headdim_v, left, right,
        upper_left, scale, softcap, alibi_slopes is not None, sinks is not None, seqlen_new,
        None if block_table is None else slots, rotary_dim, interleaved, num_splits,
    )  # fmt: skip


def _check_rows(name: str, t: Tensor, q: Tensor) -> None:
    is_tensor(OP, name, t)
    same_device(OP, name, t, "q", q.device)
    same_dtype(OP, name, t, "q", q.dtype)
    if t.dim() == 4:
        unit_last_stride(OP, name, t)


def _check_block_table(block_table: Tensor | None, batch: int, blocks: int, slots: int, device: torch.device) -> int:
    """How many keys each sequence can hold."""
    if block_table is None:
        return slots
    check_index(OP, "block_table", block_table, "[batch, max_blocks]", 2, device)
    if block_table.shape[0] != batch:
        fail(OP, "block_table", f"of the batch size of q ({batch})", block_table.shape[0])
    if slots == 0:
        fail(OP, "k_cache", "[num_blocks, block_size, nheads_k, headdim] with block_size > 0", 0)
    if has_data(block_table) and block_table.numel() > 0:
        low, high = (int(x) for x in block_table.aminmax())
        if low < 0 or high >= blocks:
            fail(
                OP, "block_table", f"between 0 and {blocks - 1} (k_cache has {blocks} blocks)", low if low < 0 else high
            )
    return block_table.shape[1] * slots


def _check_new(
    k: Tensor | None, v: Tensor | None, batch: int, nheads_k: int, headdim: int, headdim_v: int, q: Tensor
) -> int:
    """How many keys the call appends."""
    if k is None and v is None:
        return 0
    if k is None or v is None:
        fail(OP, "k" if k is None else "v", f"given together with {'v' if k is None else 'k'}", None)
    _check_rows("k", k, q)
    _check_rows("v", v, q)
    if k.dim() != 4:
        fail(OP, "k", "[batch, seqlen_new, nheads_k, headdim]", tuple(k.shape))
    shape(OP, "k", k, (batch, k.shape[1], nheads_k, headdim), "[batch, seqlen_new, nheads_k, headdim]")
    shape(OP, "v", v, (batch, k.shape[1], nheads_k, headdim_v), "[batch, seqlen_new, nheads_k, headdim_v]")
    return k.shape[1]


def _check_writable(k_cache: Tensor, v_cache: Tensor) -> None:
    """Every slot of both caches is memory of its own."""
    if v_cache is k_cache:
        fail(OP, "v_cache", "another tensor than k_cache when k and v are appended", "the same")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if 0 in cache.stride() and any(d == 0 and n > 1 for d, n in zip(cache.stride(), cache.shape, strict=True)):
            fail(OP, name, "memory for every slot when k and v are appended", f"an expanded tensor {cache.stride()}")


def _check_seqlens(cache_seqlens: Tensor, batch: int, seqlen_new: int, capacity: int, device: torch.device) -> None:
    check_index(OP, "cache_seqlens", cache_seqlens, "[batch]", 1, device)
    shape(OP, "cache_seqlens", cache_seqlens, (batch,), "[batch]")
    if has_data(cache_seqlens):
        values = cache_seqlens.tolist()
        if min(values, default=0) < 0:
            fail(OP, "cache_seqlens", "at least 0", min(values))
        if max(values, default=0) + seqlen_new > capacity:
            room = f"at most {capacity - seqlen_new}: the cache holds {capacity} keys and {seqlen_new} are appended"
            fail(OP, "cache_seqlens", room, max(values))


def _check_slots(block_table: Tensor, lengths: list[int], seqlen_new: int, slots: int) -> None:
    """No slot of a paged cache is appended to twice."""
    first = min(lengths) // slots
    table = block_table[:, first : (max(lengths) + seqlen_new - 1) // slots + 1].tolist()
    taken: dict[int, list[tuple[int, int, int]]] = {}  # of each block: a sequence, and the slots that it writes
    for sequence, start in enumerate(lengths):
        end = start + seqlen_new
        for page in range(start // slots, (end - 1) // slots + 1):
            low, high = max(start - page * slots, 0), min(end - page * slots, slots)
            block = table[sequence][page - first]
            for other, begin, stop in taken.setdefault(block, []):
                if low < stop and begin < high:
                    fact = f"slot {max(low, begin)} of block {block} for sequences {other} and {sequence}"
                    fail(OP, "block_table", "such that every appended key has a slot of its own", fact)
            taken[block].append((sequence, low, high))


def _check_rope(
    cos: Tensor | None, sin: Tensor | None, k: Tensor | None, cache_seqlens: Tensor, q: Tensor
) -> int | None:
    """The rotary dimension, None without RoPE."""
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        fail(OP, "cos" if cos is None else "sin", f"given together with {'sin' if cos is None else 'cos'}", None)
    if k is None:
        fail(OP, "k", "given with cos and sin (the keys in the cache are rotated already)", None)
    if k.shape[1] != q.shape[1]:
        fail(OP, "k", f"of the seqlen of q ({q.shape[1]}), which shares its positions when cos is given", k.shape[1])
    for name, table in (("cos", cos), ("sin", sin)):
        is_tensor(OP, name, table)
        same_device(OP, name, table, "q", q.device)
        if table.dtype not in (q.dtype, torch.float32):
            fail(OP, name, f"float32 or of the dtype of q ({q.dtype})", table.dtype)
        if table.dim() != 2 or table.shape != cos.shape:
            fail(OP, name, "[seqlen, rotary_dim / 2], the same for cos and sin", tuple(table.shape))
        unit_last_stride(OP, name, table)
    if not 0 < 2 * cos.shape[1] <= q.shape[3]:
        fail(
            OP,
            "cos",
            f"[seqlen, rotary_dim / 2] with rotary_dim at most the headdim of q ({q.shape[3]})",
            tuple(cos.shape),
        )
    if has_data(cache_seqlens) and cache_seqlens.numel() > 0:
        last = int(cache_seqlens.max()) + q.shape[1]
        if last > cos.shape[0]:
            fail(OP, "cos", f"a table of at least {last} positions (cache_seqlens + the new ones)", cos.shape[0])
    return 2 * cos.shape[1]
