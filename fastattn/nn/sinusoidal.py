"""SinusoidalPositionalEncoding: positions for models without RoPE."""

from __future__ import annotations

import torch

from fastattn.ops._check import fail

Tensor = torch.Tensor


class SinusoidalPositionalEncoding(torch.nn.Module):
    """x + PE, PE[m, 2i] = sin(m / 10000^(2i / d_model)), PE[m, 2i + 1] = cos(the same) (arXiv:1706.03762, section 3.5).

    d_model      features of x
    max_seqlen   positions of the table
    dropout      applied to the sum, as in the paper
    batch_first  x is [batch, seqlen, d_model]; otherwise [seqlen, batch, d_model]. [seqlen, d_model] works with both

    The table is computed in float64, rounded to float32 and kept out of the state_dict.

    >>> x = fastattn.nn.SinusoidalPositionalEncoding(512, batch_first=True)(embedding(tokens))
    """

    table: Tensor

    def __init__(self, d_model: int, max_seqlen: int = 5000, dropout: float = 0.0, batch_first: bool = False) -> None:
        super().__init__()
        self.d_model, self.batch_first = d_model, batch_first
        self.dropout = torch.nn.Dropout(dropout)
        frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
        angle = torch.arange(max_seqlen, dtype=torch.float64)[:, None] * frequency
        table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d_model]
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x with the positions offset, offset + 1, ... added. Raises ValueError when they exceed max_seqlen."""
        along = 1 if self.batch_first and x.dim() == 3 else 0
        seqlen = x.shape[along]
        if x.shape[-1] != self.d_model:
            fail("SinusoidalPositionalEncoding", "x", f"of d_model ({self.d_model}) features", x.shape[-1])
        if offset + seqlen > self.table.shape[0]:
            room = f"at most max_seqlen ({self.table.shape[0]}) positions long"
            fail("SinusoidalPositionalEncoding", "x", room, offset + seqlen)
        rows = self.table[offset : offset + seqlen].to(x.dtype)
        return self.dropout(x + (rows[:, None] if x.dim() == 3 and along == 0 else rows))
