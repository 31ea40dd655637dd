"""attention_kvcache in CUDA C++: append to the cache, attend to it in splits of the keys, combine the splits."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention._arguments import edges, is_float, slopes_stride, strides
from fastattn.ops.attention.tuning import FEWEST_KEYS, splits
from fastattn.runtime import cuda, gpu

Tensor = torch.Tensor
_HEADER = "attention_decode_params.h"
_RESERVED = 1 << 10  # bytes of shared memory that the driver keeps per block


class DecodeTile(NamedTuple):
    """What a block of the decode kernel is: 16 rows per row warp, `keys` keys per key warp and tile, a ring of `stages`
    tiles; `per_sm` blocks fit a multiprocessor. Head dimensions are those of the kernel, multiples of 32."""

    headdim: int
    headdim_v: int
    row_warps: int
    key_warps: int
    keys: int
    stages: int
    per_sm: int

    def __str__(self) -> str:
        tile = f"decode {16 * self.row_warps}x{self.keys * self.key_warps}, {self.threads // 32} warps"
        return f"{tile}, {self.stages} stages (by analysis: registers and shared memory; not measured)"

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.key_warps

    @property
    def shared(self) -> int:
        """Bytes: q, then the ring, which the results of the warps use after it."""
        ring = self.stages * 2 * self.keys * self.key_warps * (self.headdim + self.headdim_v)
        results = self.threads // 2 * 4 * (self.headdim_v + 8 + 2)
        return 32 * self.row_warps * self.headdim + max(ring, results)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


@functools.cache
def find(arch: int, headdim: int, headdim_v: int, rows: int) -> DecodeTile | None:
    """The tile for `rows` rows (queries times the heads of a group); None where not even the smallest fits.

    A single tile of rows is bound by memory: two blocks with three stages, so that two tiles of each are under way, and
    otherwise what fits. More rows share their keys, and the widest block that fits reads these least often.
    """
    limit = gpu.shared_limit(arch)
    d, dv = _up(headdim, 32), _up(headdim_v, 32)
    widest = max(d, dv)
    if rows <= 16:
        keys = 32 if widest <= 64 else 16
        tried = [DecodeTile(d, dv, 1, 4, keys, stages, per_sm) for per_sm in (2, 1) for stages in (4, 3)]
        tried += [DecodeTile(d, dv, 1, key_warps, keys, 2, 1) for key_warps in (4, 2)]
    else:
        keys = 64 if widest <= 128 else 32
        tried = [DecodeTile(d, dv, 4, 1, keys, 2, per_sm) for per_sm in (2, 1)]
        if rows > 64 and widest <= 128:
            tried.insert(0, DecodeTile(d, dv, 8, 1, keys, 2, 1))
    return next((t for t in tried if t.per_sm * (t.shared + _RESERVED) <= limit + _RESERVED), None)


def row_of(spec: Any, device: torch.device | None = None) -> DecodeTile:
    """The tile of a validated call; without a device, on the current one of the call's kind."""
    return _tile(spec, cuda.arch(torch.device(spec.device) if device is None else device))


def _tile(spec: Any, arch: int) -> DecodeTile:
    tile = find(arch, spec.headdim, spec.headdim_v, spec.seqlen_q * (spec.nheads // spec.nheads_k))
    assert tile is not None  # the smallest fits every GPU from sm_80 on, up to the head dimensions of backends.py
    return tile


class _Plan(NamedTuple):
    decode: cuda.Kernel
    grid: tuple[int, int, int]
    numbers: tuple[Any, ...]  # the fields of AttentionDecodeParams from nheads to softcap
    part: tuple[int, int, int] | None  # num_splits, rows, headdim_v; None for one split
    combine: cuda.Kernel
    combine_grid: tuple[int, int, int]
    combine_numbers: tuple[int, ...]  # the fields of AttentionCombineParams from rows on


@functools.lru_cache(4096)
def _plan(spec: Any, sinks_float: int, arch: int, sms: int) -> _Plan:
    """All that does not depend on the tensors."""
    name, tile = cuda.TYPES[spec.dtype], _tile(spec, arch)
    rows = spec.batch * spec.seqlen_q * spec.nheads
    blocks_m = -(-spec.seqlen_q * (spec.nheads // spec.nheads_k) // (16 * tile.row_warps))
    programs = blocks_m * spec.nheads_k * spec.batch
    num_splits, least = spec.num_splits, 1
    if num_splits is None:
        least = -(-FEWEST_KEYS // (tile.keys * tile.key_warps))
        num_splits = splits(programs, spec.seqlen_k, sms * tile.per_sm)
    constants = (name, *map(str, tile[:6]))
    decode = cuda.kernel(
        "attention_decode.cuh", "attention_decode_kernel", constants, (_HEADER, "AttentionDecodeParams"),
        tile.threads, tile.shared,
    )  # fmt: skip
    combine = cuda.kernel(
        "attention_combine.cuh", "attention_combine_kernel", (name,), (_HEADER, "AttentionCombineParams"),
        256, 8 * 4 * spec.headdim_v,
    )  # fmt: skip
    numbers = (
        spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.seqlen_q, spec.seqlen_k, spec.seqlen_new,
        spec.block_size or 1, blocks_m, rows, num_splits, least, *edges(spec), spec.upper_left, sinks_float, float(spec.scale),
        spec.softcap or 0.0,
    )  # fmt: skip
    warps_per_row = next((n for n in (1, 2, 4) if num_splits <= 4 * n), 8)
    return _Plan(
        decode,
        (programs * num_splits, 1, 1),
        numbers,
        (num_splits, rows, spec.headdim_v) if num_splits > 1 else None,
        combine,
        (-(-rows * warps_per_row // 8), 1, 1),
        (rows, num_splits, spec.headdim_v, spec.nheads, spec.seqlen_q, warps_per_row),
    )


@functools.lru_cache(4096)
def _multiples_of_8(strides: tuple[int, ...]) -> bool:
    return not any(stride % 8 for stride in strides)


def kvcache(
    spec: Any,
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
    o: Tensor,
    lse: Tensor,
) -> None:
    if k is not None and v is not None:
        q = _append(spec, q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin)
    device = q.device
    plan = _plan(spec, is_float(sinks), cuda.arch(device), cuda.sms(device))
    part = part_lse = None
    if plan.part is not None:
        part, part_lse = lse.new_empty(plan.part), lse.new_empty(plan.part[:2])
    steps = (*strides(q), *strides(k_cache), *strides(v_cache))
    aligned = _multiples_of_8(steps) and not (q.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()) & 15
    cuda.run(
        plan.decode,
        plan.grid,
        (
            q, k_cache, v_cache, o, lse, cache_seqlens, block_table, alibi_slopes, sinks, part, part_lse,
            *steps, 0 if block_table is None else block_table.stride(0),
            slopes_stride(alibi_slopes), *plan.numbers, aligned,
        ),
        device,
    )  # fmt: skip
    if part is not None:
        cuda.run(plan.combine, plan.combine_grid, (part, part_lse, o, lse, *plan.combine_numbers), device)


class _AppendPlan(NamedTuple):
    kernel: cuda.Kernel
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # the fields of AttentionAppendParams from rows to half


@functools.lru_cache(4096)
def _append_plan(spec: Any, table: torch.dtype, aligned: bool) -> _AppendPlan:
    width, threads, half = 8 if aligned else 1, 256, (spec.rotary_dim or 0) // 2
    rows = spec.batch * spec.seqlen_new
    units_k, units_v = (spec.headdim - half) // width, spec.headdim_v // width
    units = spec.nheads_k * (units_k + units_v) + (spec.nheads * units_k if half else 0)
    rows_per_block = max(1, threads // units)
    kernel = cuda.kernel(
        "attention_append.cuh", "attention_append_kernel", (cuda.TYPES[spec.dtype], cuda.TYPES[table], str(width)),
        (_HEADER, "AttentionAppendParams"), threads,
    )  # fmt: skip
    sizes = (
        rows, rows_per_block, units, units_k, units_v, spec.nheads, spec.nheads_k, spec.seqlen_new, spec.seqlen_k,
        spec.block_size or 1, spec.headdim, half,
    )  # fmt: skip
    return _AppendPlan(kernel, (-(-rows // rows_per_block), -(-rows_per_block * units // threads), 1), sizes)


def _append(
    spec: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, k: Tensor, v: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write k and v into the caches; q, rotated when there are cos and sin."""
    rotated, table, table_rows, turns = None, torch.float32, 0, (0, 0)
    steps = (*strides(k), *strides(v), *strides(q), *strides(k_cache), *strides(v_cache))
    places = k.data_ptr() | v.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()
    if cos is not None and sin is not None:
        rotated, table, table_rows = q.new_empty(q.shape), cos.dtype, cos.shape[0]
        sin = sin.to(table)
        turns = (cos.stride(0), sin.stride(0))
        places |= q.data_ptr() | cos.data_ptr() | sin.data_ptr()
    aligned = not places & 15 and _multiples_of_8((*steps, *turns, (spec.rotary_dim or 0) // 2))
    plan = _append_plan(spec, table, aligned)
    cuda.run(
        plan.kernel,
        plan.grid,
        (
            k, v, None if rotated is None else q, k_cache, v_cache, rotated, cache_seqlens, block_table, cos, sin,
            *steps, 0 if block_table is None else block_table.stride(0), *turns, *plan.sizes, table_rows, spec.interleaved,
        ),
        q.device,
    )  # fmt: skip
    return q if rotated is None else rotated
