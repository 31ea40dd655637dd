"""torch's scaled_dot_product_attention served by fastattn through torch's own hook; no model is touched.

    fastattn.sdpa.enable()                 # until disable(), in every thread of the process
    with fastattn.sdpa.enabled(): ...      # for a block; what was active before comes back
    print(fastattn.sdpa.explain(query, key, value, attn_mask))

The hook is `torch.nn.attention.register_flash_attention_impl`. It replaces the flash kernels behind the aten operators,
so everything that torch routes to them is served, forward and backward, eager and compiled: `F.scaled_dot_product_attention`,
`nn.MultiheadAttention` outside its fused inference path, Hugging Face's "sdpa". What torch does not route there never
arrives here: docs/sdpa.md lists it and `explain` says it of a call. What arrives but no kernel of ours takes (float64
on a CPU, say) goes on to the kernel that torch had.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from fastattn.ops import _eager
from fastattn.ops._dispatch import Backend, choose, forced_backend
from fastattn.ops.attention import _philox
from fastattn.ops.attention.backends import BACKENDS
from fastattn.ops.attention.spec import AttentionSpec, check_attention

__all__ = ["Service", "active", "disable", "enable", "enabled", "explain"]

Tensor = torch.Tensor
_num_threads = torch.get_num_threads
_NAME = "fastattn"
_NEEDS = ("register", "activate", "restore", "current", "list")
_replaced: list[str] = []  # the implementation that `enable` found active and `disable` brings back


def enable() -> None:
    """Let fastattn serve scaled_dot_product_attention until `disable`. Calling it again changes nothing.

    Raises RuntimeError when this torch has no hook. Another implementation that was active (FA4, say) steps aside.

    >>> fastattn.sdpa.enable()
    """
    hook = _hook()
    if active():
        return
    if _NAME not in hook["list"]():
        hook["register"](_NAME, register_fn=_Overrides)
    before = hook["current"]()
    hook["activate"](_NAME)
    _replaced[:] = [] if before is None else [before]


def disable() -> None:
    """Give the operators back to whoever had them before `enable`. Does nothing when fastattn is not active.

    >>> fastattn.sdpa.disable()
    """
    if not active():
        return
    hook = _hook()
    hook["restore"]()
    while _replaced:
        hook["activate"](_replaced.pop())


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` for a block. Blocks nest; the outermost one, if it switched the hook on, switches it off again.

    >>> with fastattn.sdpa.enabled():
    ...     loss = model(batch)
    """
    before = active()
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


def active() -> bool:
    """Does fastattn serve scaled_dot_product_attention now?"""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current is not None and current() == _NAME


def _hook() -> dict[str, Callable[..., Any]]:
    """torch's hook: verbs by name."""
    plural = {"list": "list_flash_attention_impls"}
    names = {verb: plural.get(verb, f"{verb}_flash_attention_impl") for verb in _NEEDS}
    found = {verb: getattr(torch.nn.attention, name, None) for verb, name in names.items()}
    if None in found.values() or not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            "sdpa.enable: torch must have torch.nn.attention.register_flash_attention_impl and torch.library.get_kernel, "
            f"got torch {torch.__version__} without; use fastattn.nn, fastattn.hf or "
            "fastattn.scaled_dot_product_attention"
        )
    return found  # type: ignore[return-value]


# ---- the operators


class _Overrides:
    """Our kernels in front of torch's, for one activation; dropping the library puts torch's back."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch warns of every override; this one is asked for
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for key, kernels in _KERNELS.items():
                for name, kernel in kernels.items():
                    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
                        original = torch.library.get_kernel(f"aten::{name}", key)
                        self._library.impl(name, functools.partial(kernel, original), key, with_keyset=True)

    def remove(self) -> None:
        self._library = None


def _taker(op: str, spec: AttentionSpec) -> Backend | None:
    """The backend that serves a call; None when only the reference would, which torch's own kernel beats.

    A forced backend is obeyed, the reference included.
    """
    forced = forced_backend(None)
    if forced is not None:
        return choose(op, BACKENDS, spec, forced)
    return next((b for b in BACKENDS if b.name != "reference" and not b.objections(spec)), None)


def _specify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    band: tuple[int | None, int | None, bool],
    scale: float | None,
    dropout_p: float,
    packed: tuple[Any, ...] = (None, None, None, None),
) -> AttentionSpec | None:
    """None for what only torch's kernels know: rows that are not contiguous. packed: cu_seqlens and longest lengths."""
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return None
    cu_q, cu_k, max_q, max_k = packed
    return check_attention(q, k, v, None, bias, None, None, cu_q, cu_k, max_q, max_k, *band, scale, None, dropout_p)


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """torch's [batch, nheads, seqlen, headdim] as ours, [batch, seqlen, nheads, headdim]; views."""
    return tuple(t.transpose(1, 2) for t in tensors)


def _ours_fits(query: Tensor) -> bool:
    """Has an output in our layout, contiguous, the strides of torch.empty_like(query)? (Those of a size 1 do not count.)"""
    batch, heads, rows, _ = query.stride()
    return batch >= rows >= heads or (query.shape[2] == 1 and batch >= heads)


def _cpu_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu. A bool mask arrives as an additive one; causal is upper left."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    right = 0 if is_causal else None
    if attn_mask is None and not dropout_p and _ours_fits(query) and _eager.unforced():
        found = _eager.door.attention_eager(q, k, v, None, right, is_causal, scale, _num_threads())
        if found is not None:
            return found[0].transpose(1, 2), found[1].transpose(1, 2).contiguous().transpose(1, 2)
    spec = _specify(q, k, v, attn_mask, (None, right, is_causal), scale, dropout_p)
    backend = None if spec is None else _taker("attention", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    out = torch.empty_like(query)
    lse = query.new_empty(spec.batch, spec.nheads, spec.seqlen_q, dtype=_statistics(query))
    backend.impl.forward(spec, q, k, v, out.transpose(1, 2), lse, None, attn_mask, None, None, None, None, None)
    if attn_mask is not None:  # of a row that sees no key torch stores 0, which torch's backward relies on
        lse.masked_fill_(lse == float("-inf"), 0)
    # The strides that torch's meta function promises to compiled code: [batch, seqlen_q, nheads] in memory.
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_for_cpu_backward; K and V of grouped heads come unrepeated."""
    q, k, v = _dense(query, key, value)
    band = (None, 0 if is_causal else None, is_causal)
    spec = _specify(q, k, v, attn_mask, band, scale, dropout_p)
    backend = None if spec is None else _taker("attention_bwd", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    do, o = _dense(grad_out, out)
    return _dense(*_differentiate(backend, spec, do, q, k, v, o, logsumexp, attn_mask, None, None, None))


def _differentiate(
    backend: Backend,
    spec: AttentionSpec,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in our layout, contiguous."""
    do, o = (t if t.stride(-1) == 1 else t.contiguous() for t in (do, o))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    backend.impl.backward(
        spec, do, None, q, k, v, o, lse.contiguous(), None, bias, None, None, cu_seqlens_q, cu_seqlens_k, philox,
        dq, dk, dv, None, None,
    )  # fmt: skip
    return dq, dk, dv


def _statistics(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _cuda_band(is_causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None, bool]:
    """Of torch's flash operators on CUDA: aligned bottom right, and -1 is unbounded."""
    sides = [None if side is None or side < 0 else side for side in (left, right)]
    return sides[0], 0 if is_causal else sides[1], False


def _cuda_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    packed: tuple[Any, ...],
    dropout_p: float,
    band: tuple[int | None, int | None, bool],
    scale: float | None,
) -> tuple[Tensor, ...] | None:
    """out, lse and what torch's flash operators return besides; None when torch's own kernel serves. Our layout."""
    spec = _specify(q, k, v, None, band, scale, dropout_p, packed)
    backend = None if spec is None else _taker("attention", spec)
    if spec is None or backend is None:
        return None
    out = torch.empty_like(q) if out is None else out
    rows = (spec.nheads, q.shape[0]) if spec.packed else (spec.batch, spec.nheads, spec.seqlen_q)
    lse = q.new_empty(rows, dtype=torch.float32)
    philox = _philox.draw(q.device) if dropout_p > 0 else torch.zeros(2, dtype=torch.int64, device=q.device)
    cu_q, cu_k = packed[0], packed[0] if packed[1] is None else packed[1]
    drops = philox if dropout_p > 0 else None
    backend.impl.forward(spec, q, k, v, out, lse, None, None, None, None, cu_q, cu_k, drops)
    offset = torch.zeros((), dtype=torch.uint64, device=q.device)  # the pair (seed, offset) is in rng_state
    return out, lse, philox.view(torch.uint64), offset, q.new_empty(0)


def _packed(cum_seq_q: Any, cum_seq_k: Any, max_q: Any, max_k: Any) -> tuple[Any, ...]:
    return (None,) * 4 if cum_seq_q is None else (cum_seq_q, cum_seq_k, max_q, max_k)


def _cuda_flash_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> Any:
    """aten::_flash_attention_forward. others: seqused_k, alibi_slopes, block_table, num_splits, for torch's kernel."""
    found = None
    if not return_debug_mask and all(option is None for option in others.values()):
        band = _cuda_band(is_causal, window_size_left, window_size_right)
        packed = _packed(cum_seq_q, cum_seq_k, max_q, max_k)
        found = _cuda_attend(query, key, value, None, packed, dropout_p, band, scale)
    if found is not None:
        return found
    return torchs.call_boxed(
        keys, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
        scale=scale, window_size_left=window_size_left, window_size_right=window_size_right, **others,
    )  # fmt: skip


def _cuda_flash_inplace(
    torchs: Any,
    keys: Any,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> Any:
    """aten::_flash_attention_forward_no_dropout_inplace: writes into out, returns lse."""
    found = None
    if not return_debug_mask and not dropout_p and all(option is None for option in others.values()):
        band = _cuda_band(is_causal, window_size_left, window_size_right)
        packed = _packed(cum_seq_q, cum_seq_k, max_q, max_k)
        found = _cuda_attend(query, key, value, out, packed, 0.0, band, scale)
    if found is not None:
        return found[1]
    return torchs.call_boxed(
        keys, out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
        scale=scale, window_size_left=window_size_left, window_size_right=window_size_right, **others,
    )  # fmt: skip


def _cuda_flash_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Any:
    """aten::_flash_attention_backward."""
    band = _cuda_band(is_causal, window_size_left, window_size_right)
    # Outside packed calls torch passes empty tensors or None.
    packed = _packed(cum_seq_q if cum_seq_q is not None and query.dim() == 3 else None, cum_seq_k, max_q, max_k)
    spec = _specify(query, key, value, None, band, scale, dropout_p, packed)
    backend = None if spec is None else _taker("attention_bwd", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
            rng_state, unused, scale=scale, window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
    philox = rng_state.view(torch.int64) if dropout_p > 0 else None
    cu_k = packed[0] if packed[1] is None else packed[1]
    return _differentiate(backend, spec, grad_out, query, key, value, out, logsumexp, None, packed[0], cu_k, philox)


def _cuda_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_flash_attention. The output has the query's strides, as the meta function promises."""
    found = None
    if not return_debug_mask:
        out = torch.empty_like(query)
        q, k, v, o = _dense(query, key, value, out)
        found = _cuda_attend(
            q, k, v, o, _packed(None, None, None, None), dropout_p, (None, 0 if is_causal else None, False), scale
        )
    if found is None:
        return torchs.call_boxed(keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
    _, lse, rng_state, offset, debug_mask = found
    return out, lse, None, None, query.shape[2], key.shape[2], rng_state, offset, debug_mask


def _cuda_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """aten::_scaled_dot_product_flash_attention_backward. The gradients have their inputs' strides."""
    q, k, v = _dense(query, key, value)
    band = (None, 0 if is_causal else None, False)
    spec = _specify(q, k, v, None, band, scale, dropout_p)
    backend = None if spec is None else _taker("attention_bwd", spec)
    if spec is None or backend is None:
        return torchs.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
            philox_seed, philox_offset, scale=scale,
        )  # fmt: skip
    do, o = _dense(grad_out, out)
    philox = philox_seed.view(torch.int64) if dropout_p > 0 else None
    found = _differentiate(backend, spec, do, q, k, v, o, logsumexp, None, None, None, philox)
    return tuple(torch.empty_like(t).copy_(g) for t, g in zip((query, key, value), _dense(*found), strict=True))


_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
    },
    "CUDA": {
        "_flash_attention_forward": _cuda_flash_forward,
        "_flash_attention_forward_no_dropout_inplace": _cuda_flash_inplace,
        "_flash_attention_backward": _cuda_flash_backward,
        "_scaled_dot_product_flash_attention": _cuda_forward,
        "_scaled_dot_product_flash_attention_backward": _cuda_backward,
    },
}


# ---- who serves a call


@dataclass(frozen=True)
class Service:
    """What `explain` found. Prints as a sentence per fact."""

    server: str  # "fastattn" or "torch"
    kernel: str  # the backend of fastattn, or torch's choice: "flash_attention", "math", ...
    reasons: tuple[str, ...]  # why not fastattn

    def __str__(self) -> str:
        head = f"scaled_dot_product_attention: served by {self.server} ({self.kernel})"
        return "\n".join([head, *(f"  not fastattn: {reason}" for reason in self.reasons)])

    __repr__ = __str__


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Service:
    """Who serves F.scaled_dot_product_attention with these arguments now, and why not fastattn. Computes nothing.

    The arguments are those of F.scaled_dot_product_attention.
    Returns a `Service`; print it.

    >>> print(fastattn.sdpa.explain(query, key, value, dropout_p=0.1))
    scaled_dot_product_attention: served by torch (math)
      not fastattn: dropout_p is 0.1; on a CPU torch computes dropout with its math kernel
    """
    chosen = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    kernel = next(name for name, backend in SDPBackend.__members__.items() if backend.value == chosen).lower()
    reasons = [] if active() else ["the hook is off; fastattn.sdpa.enable() switches it on"]
    if chosen != SDPBackend.FLASH_ATTENTION.value:
        found = _not_routed(query, key, value, attn_mask, dropout_p)
        reasons += found or [f"torch chose its {kernel} kernel; the hook serves only flash_attention"]
        return Service("torch", kernel, tuple(reasons))
    floating = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        floating = torch.empty_like(attn_mask, dtype=query.dtype)
    q, k, v = _dense(query, key, value)
    spec = _specify(q, k, v, floating, (None, 0 if is_causal else None, is_causal), scale, dropout_p)
    if spec is not None:
        backend = _taker("attention", spec)
        if backend is not None and not reasons:
            return Service(_NAME, backend.name, ())
        if backend is None:
            reasons += [f"{b.name}: {'; '.join(b.objections(spec))}" for b in BACKENDS if b.name != "reference"]
    return Service("torch", kernel, tuple(reasons))


def _not_routed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> list[str]:
    """The known reasons why torch does not take its flash kernel."""
    reasons = []
    if not torch.backends.cuda.flash_sdp_enabled():
        reasons.append("torch.nn.attention.sdpa_kernel has switched flash_attention off")
    if query.dim() != 4:
        reasons.append(f"query has {query.dim()} dimensions; torch's fused kernels take 4")
    if query.shape[-1] != value.shape[-1]:
        reasons.append(f"the headdims of query and value differ ({query.shape[-1]} and {value.shape[-1]})")
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        reasons.append("the last dimension of query, key or value is not contiguous")
    if 0 in (*query.shape, *key.shape, *value.shape):
        reasons.append("a dimension is empty")
    if query.device.type == "cpu" and dropout_p > 0:
        reasons.append(f"dropout_p is {dropout_p}; on a CPU torch computes dropout with its math kernel")
    if attn_mask is not None and query.device.type == "cuda":
        reasons.append("attn_mask is given; torch's flash kernel for CUDA takes none")
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        reasons.append("attn_mask requires a gradient")
    return reasons
