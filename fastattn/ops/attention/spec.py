"""What an attention call must be. Runs in the op and in its fake, so eager and compiled code raise the same sentence.

The happy path touches each attribute once; only when something is wrong does a `_fail_*` look for the exact words.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch

from fastattn.ops._check import (
    FLOATING,
    fail,
    floating,
    is_tensor,
    number,
    same_device,
    same_dtype,
    shape,
    unit_last_stride,
)

Tensor = torch.Tensor
OP = "attention"
_INFINITY = float("inf")
_BSHD, _PACKED = "[batch, seqlen, nheads, headdim]", "[total, nheads, headdim], because cu_seqlens_q is given"


class AttentionSpec(NamedTuple):
    """One validated call. Band: query m sees key n when diagonal - left <= n <= diagonal + right; None is unbounded."""

    dtype: torch.dtype
    device: str
    batch: int
    nheads: int
    nheads_k: int
    seqlen_q: int  # packed: the longest sequence (None under fake tensors, where it cannot be known)
    seqlen_k: int
    headdim: int
    headdim_v: int
    packed: bool
    left: int | None
    right: int | None
    upper_left: bool
    scale: float
    softcap: float | None
    mask: bool
    bias: bool
    alibi: bool
    sinks: bool
    dropout_p: float
    deterministic: bool = False  # the backward must give equal bits for equal inputs


def band(op: str, causal: bool | str, window: Any) -> tuple[int | None, int | None, bool]:
    """(left, right, upper_left) of the public `causal` and `window`."""
    if causal is not False and causal is not True and causal != "upper_left":
        fail(op, "causal", "False, True (aligned bottom right) or 'upper_left'", repr(causal))
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            fail(op, "window", "a pair (left, right) of key counts, None being unbounded", repr(window))
        left, right = window
        for side in window:
            countable = isinstance(side, (int, torch.SymInt)) and not isinstance(side, bool)
            if side is not None and not (countable and side >= 0):
                fail(op, "window", "a pair (left, right) of key counts >= 0 or None (unbounded)", repr(window))
    if causal:
        right = 0
    return left, right, causal == "upper_left"


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    left: int | None,
    right: int | None,
    upper_left: bool,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    op: str = OP,
) -> AttentionSpec:
    """The specification of a call; ValueError in the user's words when it is wrong."""
    try:
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
        dtype, device = q.dtype, q.device
        if cu_seqlens_q is None:
            batch, seqlen_q, nheads, headdim = q_shape
            batch_k, seqlen_k, nheads_k, headdim_k = k_shape
            batch_v, seqlen_v, nheads_v, headdim_v = v_shape
        else:
            seqlen_q, nheads, headdim = q_shape
            seqlen_k, nheads_k, headdim_k = k_shape
            seqlen_v, nheads_v, headdim_v = v_shape
            batch = batch_k = batch_v = 0
    except (AttributeError, ValueError, RuntimeError):  # the last one from nested tensors
        _fail_rank(op, _BSHD if cu_seqlens_q is None else _PACKED, q=q, k=k, v=v)
    if k.dtype != dtype or v.dtype != dtype or k.device != device or v.device != device or dtype not in FLOATING:
        _fail_kind(op, q, k, v)
    if headdim_k != headdim or nheads_v != nheads_k or seqlen_v != seqlen_k or batch_k != batch or batch_v != batch:
        _fail_shape(op, q, k, v)
    if nheads_k == 0 or nheads % nheads_k != 0 or nheads == 0 or headdim == 0 or headdim_v == 0:
        _fail_heads(op, nheads, nheads_k, headdim)
    if q.stride()[-1] != 1 or k.stride()[-1] != 1 or v.stride()[-1] != 1:
        for name, t in (("q", q), ("k", k), ("v", v)):
            unit_last_stride(op, name, t)
    if scale is None:
        scale = headdim**-0.5
    elif type(scale) is not float or not -_INFINITY < scale < _INFINITY:
        number(op, "scale", scale)
    if softcap is not None:
        number(op, "softcap", softcap, low=0.0)
    if dropout_p != 0.0:
        check_dropout(op, dropout_p)
    packed = cu_seqlens_q is not None
    if cu_seqlens_q is not None:
        batch, seqlen_q, seqlen_k = _check_packed(
            op, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, device
        )
    elif cu_seqlens_k is not None or max_seqlen_q is not None or max_seqlen_k is not None:
        given = "cu_seqlens_k" if cu_seqlens_k is not None else "max_seqlen_q and max_seqlen_k"
        fail(op, given, "None unless cu_seqlens_q is given", "a value")
    if mask is not None:
        check_pairs(op, "mask", mask, (batch, nheads, seqlen_q, seqlen_k), device, dtype)
    if bias is not None:
        check_pairs(op, "bias", bias, (batch, nheads, seqlen_q, seqlen_k), device, dtype)
    if alibi_slopes is not None:
        check_slopes(op, alibi_slopes, batch, nheads, device)
    if sinks is not None:
        check_sinks(op, sinks, nheads, device, dtype)
    return AttentionSpec(
        dtype, device.type, batch, nheads, nheads_k, seqlen_q, seqlen_k, headdim, headdim_v, packed, left, right,
        upper_left, scale, softcap, mask is not None, bias is not None, alibi_slopes is not None, sinks is not None,
        dropout_p,
    )  # fmt: skip


def _fail_rank(op: str, layout: str, **tensors: Any) -> NoReturn:
    rank = layout.count(",", 0, layout.index("]")) + 1
    for name, t in tensors.items():
        is_tensor(op, name, t)
        if t.dim() != rank:
            fail(op, name, layout, f"shape {tuple(t.shape)}")
    raise AssertionError(f"{op}: the ranks of {', '.join(tensors)} are right")


def _fail_kind(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    floating(op, "q", q)
    for name, t in (("k", k), ("v", v)):
        same_device(op, name, t, "q", q.device)
        same_dtype(op, name, t, "q", q.dtype)


def _fail_shape(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.dim() == 4 and k.shape[0] != q.shape[0]:
        fail(op, "k", f"of the batch size of q ({q.shape[0]})", k.shape[0])
    if k.shape[-1] != q.shape[-1]:
        fail(op, "k", f"of the headdim of q ({q.shape[-1]})", k.shape[-1])
    where = "[total_k, nheads_k]" if k.dim() == 3 else "[batch, seqlen_k, nheads_k]"
    fail(op, "v", f"of k's {where} {tuple(k.shape[:-1])}", tuple(v.shape[:-1]))


def _fail_heads(op: str, nheads: int, nheads_k: int, headdim: int) -> NoReturn:
    if nheads == 0:
        fail(op, "q", "a tensor with nheads > 0", nheads)
    if nheads_k == 0 or nheads % nheads_k != 0:
        fail(op, "k", f"a tensor whose nheads_k divides the nheads of q ({nheads})", nheads_k)
    fail(op, "q" if headdim == 0 else "v", "a tensor with headdim > 0", 0)


def check_dropout(op: str, dropout_p: Any) -> None:
    number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        fail(op, "dropout_p", "a probability in [0, 1)", dropout_p)


def check_pairs(
    op: str, name: str, t: Tensor, pairs: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> None:
    """A mask or a bias broadcasts to [batch, nheads, seqlen_q, seqlen_k]; a None among these sizes is not known."""
    is_tensor(op, name, t)
    same_device(op, name, t, "q", device)
    if name == "mask":
        if t.dtype != torch.bool:
            fail(op, name, "boolean, True where a query may attend (use bias for additive masks)", t.dtype)
    elif t.dtype not in (dtype, torch.float32):
        fail(op, name, f"float32 or of the dtype of q ({dtype})", t.dtype)
    elif t.is_neg():
        fail(op, name, "a tensor without the negative bit (call .resolve_neg())", "a view with it")
    fits = t.dim() <= 4
    for size, full in zip(reversed(t.shape), reversed(pairs), strict=False):
        fits = fits and (full is None or size == 1 or size == full)
    if not fits:
        fail(op, name, f"broadcastable to [batch, nheads, seqlen_q, seqlen_k] {tuple(pairs)}", tuple(t.shape))


def check_slopes(op: str, alibi_slopes: Tensor, batch: int, nheads: int, device: torch.device) -> None:
    is_tensor(op, "alibi_slopes", alibi_slopes)
    same_device(op, "alibi_slopes", alibi_slopes, "q", device)
    if alibi_slopes.dtype != torch.float32:
        fail(op, "alibi_slopes", "float32", alibi_slopes.dtype)
    sizes = tuple(alibi_slopes.shape)
    if sizes != (nheads,) and sizes != (batch, nheads):
        fail(op, "alibi_slopes", f"of shape [nheads] ({nheads},) or [batch, nheads] ({batch}, {nheads})", sizes)
    unit_last_stride(op, "alibi_slopes", alibi_slopes)


def check_sinks(op: str, sinks: Tensor, nheads: int, device: torch.device, dtype: torch.dtype) -> None:
    is_tensor(op, "sinks", sinks)
    same_device(op, "sinks", sinks, "q", device)
    if sinks.dtype not in (dtype, torch.float32):
        fail(op, "sinks", f"float32 or of the dtype of q ({dtype})", sinks.dtype)
    shape(op, "sinks", sinks, (nheads,), "[nheads]")
    unit_last_stride(op, "sinks", sinks)


def has_data(t: Tensor) -> bool:
    """Can values be read here without waiting: a real CPU tensor, not a fake one."""
    return t.is_cpu and type(t) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _is_real(t: Tensor) -> bool:
    return type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta and not torch.compiler.is_compiling()


def check_index(op: str, name: str, t: Tensor, sizes: str, rank: int, device: torch.device) -> None:
    """An int32 tensor of the given rank that the kernels may walk."""
    is_tensor(op, name, t)
    same_device(op, name, t, "q", device)
    if t.dtype != torch.int32 or t.dim() != rank or not t.is_contiguous():
        fail(op, name, f"a contiguous int32 tensor {sizes}", f"{t.dtype} {tuple(t.shape)}")


def _check_cu_seqlens(op: str, name: str, t: Tensor, total: int, of: str, device: torch.device) -> int | None:
    """Its longest sequence, None where the values cannot be read."""
    check_index(op, name, t, "[batch + 1]", 1, device)
    if t.shape[0] < 1:
        fail(op, name, "a contiguous int32 tensor [batch + 1]", tuple(t.shape))
    if not has_data(t):
        return None
    values = t.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
        fact = values if len(values) <= 16 else f"{values[:16]}..."
        fail(op, name, f"non-decreasing from 0 to the rows of {of} ({total})", fact)
    return max(lengths, default=0)


def _longest(op: str, name: str, cu_seqlens: Tensor, found: int | None, given: int | None) -> Any:
    """The caller's bound, which must cover the longest sequence found, or that; None under fake tensors."""
    if given is None:
        if found is None and _is_real(cu_seqlens):
            return int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if cu_seqlens.shape[0] > 1 else 0
        return found
    if found is not None and given < found:
        fail(op, name, f"at least the longest sequence ({found})", given)
    return given


def _check_packed(
    op: str,
    total_q: int,
    total_k: int,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
    device: torch.device,
) -> tuple[int, int, int]:
    longest_q = longest_k = _check_cu_seqlens(op, "cu_seqlens_q", cu_q, total_q, "q", device)
    if cu_k is not None and cu_k is not cu_q:
        longest_k = _check_cu_seqlens(op, "cu_seqlens_k", cu_k, total_k, "k", device)
        if cu_k.shape[0] != cu_q.shape[0]:
            fail(op, "cu_seqlens_k", f"of the length of cu_seqlens_q ({cu_q.shape[0]})", cu_k.shape[0])
    elif total_q != total_k:
        fail(op, "cu_seqlens_k", f"given when k has other rows than q ({total_q})", f"None and {total_k} rows of k")
    return (
        cu_q.shape[0] - 1,
        _longest(op, "max_seqlen_q", cu_q, longest_q, max_q),
        _longest(op, "max_seqlen_k", cu_q if cu_k is None else cu_k, longest_k, max_k),
    )
