"""torch's scaled_dot_product_attention served by fastattn through torch's own hook; no model is touched.

    fastattn.sdpa.enable()                 # until disable(), in every thread of the process
    with fastattn.sdpa.enabled(): ...      # for a block; what was active before comes back
    print(fastattn.sdpa.explain(query, key, value, attn_mask))

The hook is `torch.nn.attention.register_flash_attention_impl`. It replaces the kernels behind the aten operators of fused
attention (flash, and on CUDA cuDNN's and the memory-efficient one, too), so everything that torch routes to them is served,
forward and backward, eager and compiled: `F.scaled_dot_product_attention`, `nn.MultiheadAttention` outside its fused
inference path, Hugging Face's "sdpa". What torch does not route there never arrives here: docs/sdpa.md lists it and
`explain` says it of a call. What arrives but no kernel of ours takes (float64, say) goes on to the kernel that torch had.
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

from fastattn.ops.attention.backends import BACKENDS
from fastattn.sdpa import _cpu, _cuda_flash, _cuda_fused
from fastattn.sdpa._calls import dense, specify, taker

__all__ = ["Service", "active", "disable", "enable", "enabled", "explain"]

Tensor = torch.Tensor
_NAME = "fastattn"
_KERNELS = {"CPU": _cpu.KERNELS, "CUDA": _cuda_flash.KERNELS | _cuda_fused.KERNELS}
_SERVED = {"cpu": ("FLASH_ATTENTION",), "cuda": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")}
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
                    if _has_kernel(name, key):
                        original = torch.library.get_kernel(f"aten::{name}", key)
                        self._library.impl(name, functools.partial(kernel, original), key, with_keyset=True)

    def remove(self) -> None:
        self._library = None


def _has_kernel(name: str, key: str) -> bool:
    """Does this torch know the operator (2.11 lacks one of them), and has it a kernel for the dispatch key?"""
    return hasattr(torch.ops.aten, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


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
    try:
        chosen = torch._fused_sdp_choice(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except RuntimeError as refusal:  # on CUDA, when sdpa_kernel leaves none that takes the call
        return Service("torch", "none", (f"torch refuses the call: {refusal}",))
    kernel = next(name for name, backend in SDPBackend.__members__.items() if backend.value == chosen).lower()
    reasons = [] if active() else ["the hook is off; fastattn.sdpa.enable() switches it on"]
    served = [name.lower() for name in _SERVED.get(query.device.type, ())]
    if kernel not in served:
        found = _not_routed(query, key, value, attn_mask, dropout_p)
        reasons += found or [
            f"torch chose its {kernel} kernel; the hook serves {', '.join(served) or 'no such device'}"
        ]
        return Service("torch", kernel, tuple(reasons))
    floating = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        floating = torch.empty_like(attn_mask, dtype=query.dtype)
    q, k, v = dense(query, key, value)
    spec = specify(q, k, v, floating, (None, 0 if is_causal else None, is_causal), scale, dropout_p)
    if spec is not None:
        backend = taker("attention", spec)
        if backend is not None and not reasons:
            return Service(_NAME, backend.name, ())
        if backend is None:
            reasons += [f"{b.name}: {'; '.join(b.objections(spec))}" for b in BACKENDS if b.name != "reference"]
    return Service("torch", kernel, tuple(reasons))


def _not_routed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> list[str]:
    """The known reasons why torch takes none of the kernels that are served."""
    reasons = []
    if query.dim() != 4:
        reasons.append(f"query has {query.dim()} dimensions; torch's fused kernels take 4")
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        reasons.append("the last dimension of query, key or value is not contiguous")
    if 0 in (*query.shape, *key.shape, *value.shape):
        reasons.append("a dimension is empty")
    if query.device.type != "cpu":
        return reasons
    if not torch.backends.cuda.flash_sdp_enabled():
        reasons.append("torch.nn.attention.sdpa_kernel has switched flash_attention off")
    if query.shape[-1] != value.shape[-1]:
        reasons.append(f"the headdims of query and value differ ({query.shape[-1]} and {value.shape[-1]})")
    if dropout_p > 0:
        reasons.append(f"dropout_p is {dropout_p}; on a CPU torch computes dropout with its math kernel")
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        reasons.append("attn_mask requires a gradient")
    return reasons
