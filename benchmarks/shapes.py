"""The shapes that are measured, with their FLOPs and bytes: only visible query-key pairs count."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class AttentionShape:
    """One attention problem.

    window    keys to the left of the causal diagonal
    lengths   of the sequences behind a padding mask, or of a packed batch (then batch is 1 and seqlen their sum)
    bias      "heads": [1, nheads, seqlen_q, seqlen_k], "batch": [batch, nheads, seqlen_q, seqlen_k]
    layout    order in memory, "bhsd", "bshd" or "qkv" (one projection); what a call gets is a view of it
    """

    batch: int
    nheads: int
    seqlen_q: int
    seqlen_k: int
    headdim: int
    nheads_k: int = 0
    causal: bool = False
    window: int | None = None
    lengths: tuple[int, ...] = ()
    packed: bool = False
    bias: str = ""
    layout: str = "bhsd"

    @property
    def kv_heads(self) -> int:
        return self.nheads_k or self.nheads

    @property
    def label(self) -> str:
        heads = f"{self.nheads}/{self.nheads_k}" if self.nheads_k else str(self.nheads)
        length = str(self.seqlen_q) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}:{self.seqlen_k}"
        parts = [f"{self.batch}x{heads}x{length}x{self.headdim}"]
        if self.causal and self.window is None:
            parts.append("causal")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.packed:
            parts.append(f"{len(self.lengths)} sequences")
        elif self.lengths:
            parts.append(f"{100 * sum(self.lengths) // (self.batch * self.seqlen_k)} % valid")
        if self.bias:
            parts.append(f"bias per {'head' if self.bias == 'heads' else 'batch and head'}")
        if self.layout != "bhsd":
            parts.append(self.layout)
        return " ".join(parts)

    def visible(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch or 1, 1, len(rows), seqlen_k] bool: may query row see key; the definition, written down once more."""
        m, n = rows[:, None], torch.arange(self.seqlen_k)[None, :]
        diagonal = m + self.seqlen_k - self.seqlen_q
        seen = torch.ones(len(rows), self.seqlen_k, dtype=torch.bool)
        if self.causal:
            seen &= n <= diagonal
        if self.window is not None:
            seen &= n >= diagonal - self.window
        if self.packed:
            owner = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
            seen &= owner[m] == owner[n]
        elif self.lengths:
            return (seen[None] & (n[None] < torch.tensor(self.lengths)[:, None, None]))[:, None]
        return seen[None, None]

    def pairs(self) -> int:
        """Visible query-key pairs over batch and heads: the sum of `visible`, without building it."""
        if self.packed:
            parts = (replace(self, seqlen_q=n, seqlen_k=n, lengths=(), packed=False) for n in self.lengths)
            return sum(part.pairs() for part in parts)
        diagonal = torch.arange(self.seqlen_q) + self.seqlen_k - self.seqlen_q
        total = 0
        for keys in self.lengths or (self.seqlen_k,) * self.batch:
            last = diagonal.clamp(max=keys - 1) if self.causal else torch.full_like(diagonal, keys - 1)
            first = torch.zeros_like(diagonal) if self.window is None else (diagonal - self.window).clamp(min=0)
            total += int((last - first + 1).clamp(min=0).sum())
        return total * self.nheads

    def forward_flops(self) -> int:
        """Two products of 2·headdim operations per visible pair."""
        return 4 * self.pairs() * self.headdim

    def backward_flops(self) -> int:
        """Five products: the scores again, dv, dp, dq, dk."""
        return 10 * self.pairs() * self.headdim

    def kv_bytes(self, itemsize: int) -> int:
        """A decoding step reads the cache once and little else."""
        return 2 * self.batch * self.seqlen_k * self.kv_heads * self.headdim * itemsize


def square(batch: int, nheads: int, seqlen: int, headdim: int, **options: object) -> AttentionShape:
    return AttentionShape(batch, nheads, seqlen, seqlen, headdim, **options)  # type: ignore[arg-type]


BERT_LENGTHS = (512, 384, 256, 200)  # 66 % of 4 x 512
RAGGED_LENGTHS = (1024, 37, 512, 300, 175)

FORWARD = [square(1, 8, 2048, 64), square(1, 8, 2048, 128), square(4, 12, 512, 64)]
CAUSAL = [replace(shape, causal=True) for shape in FORWARD]
SHORT = [square(32, 12, 128, 64), square(32, 12, 128, 64, causal=True)]
PREFILL = [square(1, 32, 4096, 128, nheads_k=8, causal=True)]
DECODE = [AttentionShape(1, 32, 1, 8192, 128, nheads_k=8), AttentionShape(8, 32, 1, 2048, 128, nheads_k=8)]
PADDING = [square(4, 12, 512, 64, lengths=BERT_LENGTHS)]
BIAS = [square(4, 12, 512, 64, bias="heads"), square(4, 12, 512, 64, bias="batch")]
WINDOW = [square(1, 8, 8192, 128, causal=True, window=511)]
BACKWARD = [
    *(square(1, 8, 2048, d, causal=c) for d in (64, 128) for c in (False, True)),
    square(4, 12, 512, 64),
    square(32, 12, 128, 64),
]
HEADDIMS = [square(1, 8, 2048, d) for d in (32, 80, 96, 128, 256)]
STRIDED = [square(1, 8, 2048, 128, layout=layout) for layout in ("bshd", "qkv")]
PACKED = [square(1, 8, sum(RAGGED_LENGTHS), 64, lengths=RAGGED_LENGTHS, packed=True, causal=c) for c in (False, True)]
SEQLENS = [square(1, 8, n, 64, causal=True) for n in (128, 256, 512, 1024, 2048, 4096, 8192)]
BATCHES = [square(b, 8, 512, 64) for b in (1, 2, 4, 8, 16, 32)]
THREADS = square(2, 8, 1024, 64)

NORMS = [(4096, 4096), (8192, 1024), (512, 768)]  # rows, cols
ROPE = [(1, 4096, 32, 8, 128), (1, 512, 32, 8, 128), (8, 1, 32, 8, 128)]  # batch, seqlen, nheads, nheads_k, headdim


def norm_forward_bytes(rows: int, cols: int, itemsize: int) -> int:
    """x in, y out."""
    return 2 * rows * cols * itemsize


def norm_backward_bytes(rows: int, cols: int, itemsize: int) -> int:
    """x and dy in, dx out."""
    return 3 * rows * cols * itemsize


def rope_bytes(batch: int, seqlen: int, heads: int, headdim: int, itemsize: int) -> int:
    """x in, rotated x out; the tables stay in cache. `heads` counts those of q and k."""
    return 2 * batch * seqlen * heads * headdim * itemsize
