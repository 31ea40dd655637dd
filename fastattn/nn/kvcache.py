"""KVCache: what a decoder remembers, in the three shapes that `attention_kvcache` reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastattn.ops._check import fail
from fastattn.ops.attention import attention_kvcache

Tensor = torch.Tensor
_OP = "KVCache"
_FIRST = 64  # slots of a growing cache


class KVCache:
    """Keys and values of every layer and sequence of a batch.

    nlayers, batch, nheads_k, headdim   sizes; headdim_v=None is headdim
    capacity                            slots per sequence, allocated at once (static); None grows by doubling (dynamic)
    block_size, num_blocks              paged instead: all sequences share num_blocks blocks of block_size slots, and take
                                        one when they need it (Kwon et al., PagedAttention, arXiv:2309.06180)
    dtype, device                       of the keys and values

    seqlens        int32 [batch], the keys that each sequence has
    block_table    int32 [batch, max_blocks], None unless paged
    k[i], v[i]     of layer i, as `attention_kvcache` wants them

    Each step calls `attend` once per layer and then `advance`. Not for training.
    Raises ValueError when an argument is wrong, and when a static cache or the pool of blocks is full.

    >>> cache = fastattn.nn.KVCache(nlayers, batch, nheads_k, headdim)
    >>> o = cache.attend(layer, q, k, v, cos=cos, sin=sin)
    >>> cache.advance(q.shape[1])
    """

    def __init__(
        self,
        nlayers: int,
        batch: int,
        nheads_k: int,
        headdim: int,
        *,
        headdim_v: int | None = None,
        capacity: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not dtype.is_floating_point:
            fail(_OP, "dtype", "floating", dtype)
        sizes = {"nlayers": nlayers, "nheads_k": nheads_k, "headdim": headdim, "headdim_v": headdim_v,
                 "capacity": capacity, "block_size": block_size}  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                fail(_OP, name, "at least 1", size)
        if (block_size is None) != (num_blocks is None):
            fail(_OP, "block_size and num_blocks", "given together", f"{block_size} and {num_blocks}")
        if block_size is not None and capacity is not None:
            fail(_OP, "capacity", "None for a paged cache, which num_blocks bounds", capacity)
        self.growing = capacity is None and block_size is None
        self.block_size = block_size
        self.lengths = [0] * batch
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._blocks: list[list[int]] = [[] for _ in range(batch)]  # paged: those of each sequence, in order
        self._free = list(range(num_blocks or 0))[::-1]
        self.block_table = None if block_size is None else torch.zeros(batch, 1, dtype=torch.int32, device=device)
        slots = (batch, _FIRST if capacity is None else capacity)
        if num_blocks is not None and block_size is not None:
            slots = (num_blocks, block_size)
        shapes = [(*slots, nheads_k, d) for d in (headdim, headdim if headdim_v is None else headdim_v)]
        self.k, self.v = ([torch.zeros(s, dtype=dtype, device=device) for _ in range(nlayers)] for s in shapes)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Slots that a sequence can fill now, without taking blocks or growing."""
        if self.block_size is None:
            return self.k[0].shape[1]
        return self.block_size * min((len(blocks) for blocks in self._blocks), default=0)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Append k and v to a layer and let q attend to all that it has.

        q          [batch, seqlen_new, nheads, headdim]
        k, v       [batch, seqlen_new, nheads_k, headdim(_v)]
        cos, sin   rotate q and k at their positions, which follow each sequence's own length
        options    further arguments of `attention_kvcache`: interleaved, window, softcap, sinks, return_lse, ...

        Returns what `attention_kvcache` returns. Sequences shorter than seqlen_new are padded at their end: give `advance`
        their own counts, and what was appended beyond is overwritten next time.
        """
        if not 0 <= layer < len(self.k):
            fail(_OP, "layer", f"one of {len(self.k)}, counted from 0", layer)
        self.reserve(k.shape[1])
        return attention_kvcache(
            *(q, self.k[layer], self.v[layer], self.seqlens),
            **{"k": k, "v": v, "block_table": self.block_table, "cos": cos, "sin": sin, **options},
        )

    def advance(self, count: int | Sequence[int] | Tensor) -> None:
        """After the last layer: every sequence has `count` more keys, or each its own."""
        counts = count.tolist() if isinstance(count, Tensor) else count
        counts = list(counts) if isinstance(counts, Sequence) else [counts] * self.batch
        if len(counts) != self.batch or not all(isinstance(c, int) and c >= 0 for c in counts):
            fail(_OP, "count", f"a number >= 0, or one per sequence ({self.batch})", counts)
        lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        for b, length in enumerate(lengths):
            room = self.k[0].shape[1] if self.block_size is None else self.block_size * len(self._blocks[b])
            if length > room:
                fail(
                    _OP, "count", f"at most the {room - self.lengths[b]} keys that sequence {b} has room for", counts[b]
                )
        self._set_lengths(lengths)

    def reset(self, sequences: Iterable[int] | None = None) -> None:
        """Forget these sequences, or all; their blocks are free again."""
        lengths = list(self.lengths)
        for b in range(self.batch) if sequences is None else sequences:
            if not 0 <= b < self.batch:
                fail(_OP, "sequences", f"numbers of the {self.batch} sequences, counted from 0", b)
            lengths[b] = 0
            self._free += self._blocks[b][::-1]
            self._blocks[b] = []
        self._set_lengths(lengths)

    def reserve(self, count: int) -> None:
        """Make room for `count` more keys in every sequence; `attend` does it by itself."""
        needed = [n + count for n in self.lengths]
        if self.block_size is not None:
            self._take_blocks([-(-n // self.block_size) for n in needed])
        elif max(needed, default=0) > self.k[0].shape[1]:
            if not self.growing:
                expected = f"at least {max(needed)}: {max(self.lengths)} keys are present and {count} are appended"
                fail(_OP, "capacity", expected, self.k[0].shape[1])
            slots = max(max(needed), 2 * self.k[0].shape[1])
            self.k, self.v = ([_grown(t, slots) for t in cache] for cache in (self.k, self.v))

    def _take_blocks(self, counts: list[int]) -> None:
        """Let sequence b have counts[b] blocks."""
        assert self.block_table is not None
        missing = sum(max(0, c - len(blocks)) for c, blocks in zip(counts, self._blocks, strict=True))
        if missing == 0:
            return
        if missing > len(self._free):
            total = self.k[0].shape[0]
            fail(_OP, "num_blocks", f"at least {total + missing - len(self._free)} for these sequences", total)
        for count, blocks in zip(counts, self._blocks, strict=True):
            while len(blocks) < count:
                blocks.append(self._free.pop())
        width = max(len(blocks) for blocks in self._blocks)
        rows = [blocks + [0] * (width - len(blocks)) for blocks in self._blocks]
        self.block_table = torch.tensor(rows, dtype=torch.int32, device=self.block_table.device)

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.seqlens = torch.tensor(lengths, dtype=torch.int32, device=self.seqlens.device)

    def __repr__(self) -> str:
        kind = "dynamic" if self.growing else "static" if self.block_size is None else "paged"
        return f"KVCache({kind}, {len(self.k)} layers, {list(self.k[0].shape)}, lengths {self.lengths})"


def _grown(t: Tensor, slots: int) -> Tensor:
    wider = t.new_zeros(t.shape[0], slots, *t.shape[2:])
    wider[:, : t.shape[1]] = t
    return wider
