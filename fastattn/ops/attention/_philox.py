"""Dropout's random bits: Philox4x32-10, counter-based, so that every backend, tile size and recomputation drops alike.

Salmon, Moraes, Dror, Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC11. This file is the definition; the kernels
follow it. With philox = (seed, offset) the word of query m and key n of (batch, head) is output word n & 3 of

    philox4x32_10(counter=(n >> 2, m, batch * nheads + head, low32(offset)), key=(low32(seed), high32(seed)))

and the pair is dropped when word < threshold(dropout_p).
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw(device: torch.device) -> torch.Tensor:
    """(seed, offset), int64 [2], from torch's default generator of `device`: obeys manual_seed and checkpointing."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """A 32-bit word below this drops its pair."""
    return min(round(dropout_p * 2**32), _MASK)


def _multiply(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 64-bit product of two 32-bit words, in int64 without overflow (16 bits at a time)."""
    low = (x & 0xFFFF) * factor
    middle = (x >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32_10(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four words for each counter; all tensors int64 holding 32-bit words, broadcast against each other."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_FACTORS[0], c0)
        high1, low1 = _multiply(_FACTORS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keep_mask(
    philox: torch.Tensor, dropout_p: float, first_batch: int, batch: int, nheads: int, seqlen_q: int, seqlen_k: int
) -> torch.Tensor:
    """bool [batch, nheads, seqlen_q, seqlen_k], True where the pair survives; batches count from `first_batch`."""

    def words(count: int, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
        return torch.arange(first, first + count, device=philox.device).view(shape)

    seed, offset = philox[0], philox[1]
    counter = (
        words((seqlen_k + 3) // 4, (1, 1, -1)),
        words(seqlen_q, (1, -1, 1)),
        words(batch * nheads, (-1, 1, 1), first_batch * nheads) & _MASK,
        offset & _MASK,
    )
    output = torch.stack(torch.broadcast_tensors(*philox4x32_10(counter, (seed & _MASK, (seed >> 32) & _MASK))), dim=-1)
    word = output.flatten(-2)[..., :seqlen_k]  # [batch * nheads, seqlen_q, seqlen_k]
    return (word >= threshold(dropout_p)).view(batch, nheads, seqlen_q, seqlen_k)
