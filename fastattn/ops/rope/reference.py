"""rope and rope_qk in plain PyTorch: any dtype, any device, differentiable. The law that the kernels are held to."""

from __future__ import annotations

import torch

from fastattn.ops.rope.spec import check_positions


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each pair (a, b) becomes (a cos - b sin, b cos + a sin), in float32 (float64 for float64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = (_rows_for(x, table.to(wide), position_ids) for table in (cos, sin))
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * c - b * s, b * c + a * s)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((y.to(x.dtype), rest), -1)


def rope_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rope of q and of k with the same tables."""
    turned = (rope(t, cos, sin, interleaved=interleaved, position_ids=position_ids) for t in (q, k))
    return next(turned), next(turned)


def _rows_for(x: torch.Tensor, table: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """The table's rows for x's positions, broadcastable to [batch, seqlen, nheads, half] (packed: without batch)."""
    if position_ids is None:
        rows = table[..., : x.shape[-3], :]
    elif table.dim() == 2:
        rows = table[position_ids.long()]
    else:
        ids = position_ids.long() if position_ids.dim() == 2 else position_ids.long()[None]
        batch = max(table.shape[0], ids.shape[0])
        ids, table = ids.expand(batch, -1), table.expand(batch, -1, -1)
        rows = table.gather(1, ids[..., None].expand(-1, -1, table.shape[-1]))
    rows = rows.unsqueeze(-2)
    return rows[0] if x.dim() == 3 and rows.dim() == 4 else rows


def forward(op, x, k, cos, sin, position_ids, interleaved, inverse):
    """The rotated x and k (None without k), laid out like them."""
    check_positions(op, position_ids, cos.shape[-2])
    options = {"interleaved": interleaved, "position_ids": position_ids}
    sin = -sin if inverse else sin
    return tuple(None if t is None else torch.empty_like(t).copy_(rope(t, cos, sin, **options)) for t in (x, k))
