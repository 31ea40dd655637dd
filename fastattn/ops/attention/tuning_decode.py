"""Which tiles the Triton kernels of attention_kvcache use: frozen rows by architecture, dtype, head dimension and rows."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastattn.ops.attention.tuning import generation
from fastattn.runtime import launch


class DecodeRow(NamedTuple):
    """One tile and the calls it serves: architectures from `arch`, dtypes of `width` bytes, v in the storage of k or not,
    head dimensions (the larger of q's and v's) and rows (queries times the heads of a group) up to those named."""

    arch: int
    width: int
    one_storage: bool
    headdim: int
    rows: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    per_sm: int  # programs that a multiprocessor holds

    def __str__(self) -> str:
        tile = f"decode {self.BLOCK_M}x{self.BLOCK_N}, {self.num_warps} warps, {self.num_stages} stages"
        return f"{tile} (by analysis: registers and shared memory of the compiled kernels; not measured)"


_ANY = 1 << 31


def _rows(width: int, one_storage: bool, headdim: int, *tiles: tuple[int, ...]) -> tuple[DecodeRow, ...]:
    """For sm_80 and sm_90 from tuples of rows, BLOCK_M, BLOCK_N, num_warps, num_stages, per_sm of the one and the other."""
    return tuple(
        DecodeRow(arch, width, one_storage, headdim, *(*tile[:5], per_sm))
        for tile in tiles
        for arch, per_sm in zip((80, 90), tile[5:], strict=True)
    )


ROWS = (
    *_rows(2, False, 64, (16, 16, 128, 4, 3, 2, 3), (32, 32, 64, 8, 3, 2, 2), (64, 64, 64, 4, 3, 2, 3)),
    *_rows(2, False, 64, (_ANY, 128, 64, 8, 3, 1, 1)),
    *_rows(2, False, 128, (16, 16, 64, 4, 3, 2, 3), (32, 32, 64, 8, 3, 2, 2), (64, 64, 64, 8, 3, 1, 1)),
    DecodeRow(80, 2, False, 128, _ANY, 64, 64, 8, 3, 1),
    DecodeRow(90, 2, False, 128, _ANY, 128, 64, 8, 3, 1),
    DecodeRow(80, 2, False, 192, 16, 16, 32, 4, 3, 2),
    DecodeRow(80, 2, False, 192, _ANY, 32, 32, 8, 2, 1),
    *_rows(2, False, 256, (16, 16, 32, 4, 3, 2, 3), (_ANY, 64, 32, 8, 2, 1, 1)),
    *_rows(2, False, 1024, (16, 16, 32, 8, 2, 1, 1), (_ANY, 32, 32, 8, 2, 1, 1)),
    *_rows(2, True, 1024, (16, 16, 32, 4, 3, 1, 2)),
    DecodeRow(80, 2, True, 1024, _ANY, 64, 16, 8, 3, 1),
    DecodeRow(90, 2, True, 1024, _ANY, 64, 32, 8, 2, 1),
    *_rows(4, False, 128, (_ANY, 16, 32, 8, 2, 3, 3)),
    *_rows(4, False, 256, (_ANY, 16, 16, 8, 2, 2, 2)),
    *_rows(4, False, 1024, (_ANY, 16, 16, 8, 2, 1, 2)),
)
_ODD = DecodeRow(80, 2, False, 1024, _ANY, 16, 16, 8, 2, 2)  # 16-bit caches that cannot be read 16 bytes at a time
_INTERPRETED = DecodeRow(0, 0, False, 1024, _ANY, 16, 16, 4, 1, 1)


@functools.cache
def row(arch: int, width: int, one_storage: bool, headdim: int, rows: int) -> DecodeRow:
    """The row of the newest generation not above `arch` that covers the head dimension and the rows."""
    if launch.INTERPRETED:
        return _INTERPRETED
    arch = generation(arch)
    fits = [r for r in ROWS if r.arch <= arch and r.width == width and r.headdim >= headdim and r.rows >= rows]
    newest = max(r.arch for r in fits)
    fits = [r for r in fits if r.arch == newest and r.one_storage <= one_storage]
    return min(fits, key=lambda r: (r.headdim, not r.one_storage, r.rows))


def row_of(spec: Any, device: torch.device | None = None, one_storage: bool = False, align: int = 8) -> DecodeRow:
    """The row of a validated call; without a device, on the current one of the call's kind."""
    device = torch.device(spec.device) if device is None else device
    width = 4 if spec.dtype == torch.float32 else 2
    rows = spec.seqlen_q * (spec.nheads // spec.nheads_k)
    if align == 1 and width == 2 and not launch.INTERPRETED:
        return _ODD
    return row(launch.arch(device), width, one_storage, max(spec.headdim, spec.headdim_v), rows)
