"""The operators of this room: what autograd, torch.compile and export see. `__init__.py` has the public functions.

fastattn::attention_fwd        (o, lse)                          differentiable through attention_bwd
fastattn::attention_bwd        (dq, dk, dv, dbias, dsinks)       the last two are empty unless asked for
fastattn::attention_weights    [batch, nheads, seqlen_q, seqlen_k]
fastattn::attention_weights_bwd                                  plain PyTorch on every backend
fastattn::attention_kvcache    (o, lse)                          reads the caches
fastattn::attention_kvcache_append                               the same, after writing k, v into them
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.ops import _alloc, _eager
from fastattn.ops._check import fail, same_device, same_dtype, shape
from fastattn.ops._dispatch import choose
from fastattn.ops._op import Op, plain, wants_gradient
from fastattn.ops.attention import _reference
from fastattn.ops.attention.backends import BACKENDS, WEIGHTS
from fastattn.ops.attention.kvcache_spec import check_kvcache
from fastattn.ops.attention.spec import AttentionSpec, check_attention

Tensor = torch.Tensor
_num_threads = torch.get_num_threads
_LARGE = 1 << 20  # elements; `_alloc` decides by bytes


_OPTIONS = "int? left, int? right, bool upper_left, float? scale, float? softcap"
_FORWARD = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, "
    f"Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? philox, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    f"{_OPTIONS}, float dropout_p, bool? deterministic, str? backend"
)
_NUM_FORWARD = 20
_BIAS, _SINKS = 4, 6  # among the arguments of the forward


def _statistics(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check(q, k, v, mask, bias, alibi_slopes, sinks, cu_q, cu_k, philox, max_q, max_k, *options) -> AttentionSpec:
    left, right, upper_left, scale, softcap, dropout_p = options[:6]
    if dropout_p and (philox is None or philox.dtype != torch.int64 or philox.shape != (2,)):
        fail("attention", "philox", "the int64 pair (seed, offset) because dropout_p is given", philox)
    return check_attention(
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sinks,
        cu_q,
        cu_k,
        max_q,
        max_k,
        left,
        right,
        upper_left,
        scale,
        softcap,
        dropout_p,
    )


def _new(like: Tensor, *shape: Any) -> Tensor:
    """An uninitialised tensor of like's dtype and device, a large one from our huge pages. Small calls pay 0.2 µs for it."""
    if like.is_cpu and type(like) is Tensor and like.numel() >= _LARGE:
        return _alloc.empty(shape, like.dtype, like.device)
    return like.new_empty(shape)


def _outputs(spec: AttentionSpec, q: Tensor) -> tuple[Tensor, Tensor]:
    if spec.packed:
        total_q = q.shape[0]
        o = _new(q, total_q, spec.nheads, spec.headdim_v)
        return o, q.new_empty(spec.nheads, total_q, dtype=_statistics(q))
    o = _new(q, spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v)
    if q.dtype is torch.float32:
        return o, q.new_empty(spec.batch, spec.nheads, spec.seqlen_q)
    return o, q.new_empty(spec.batch, spec.nheads, spec.seqlen_q, dtype=_statistics(q))


def _forward(
    q, k, v, mask, bias, alibi_slopes, sinks, cu_q, cu_k, philox, max_q, max_k, left, right, upper_left, scale, softcap,
    dropout_p, deterministic, backend, notes=None,
):  # fmt: skip
    simple = (
        mask is None and bias is None and alibi_slopes is None and sinks is None and cu_q is None and softcap is None
    )
    if (
        simple
        and cu_k is None
        and max_q is None
        and max_k is None
        and not dropout_p
        and backend is None
        and _eager.unforced()
    ):
        found = _eager.door.attention_eager(q, k, v, left, right, upper_left, scale, _num_threads())
        if found is not None:
            return found
    spec = _check(
        q, k, v, mask, bias, alibi_slopes, sinks, cu_q, cu_k, philox, max_q, max_k, left, right, upper_left, scale,
        softcap, dropout_p,
    )  # fmt: skip
    chosen = choose("attention", BACKENDS, spec, backend)
    o, lse = _outputs(spec, q)
    chosen.impl.forward(
        spec, q, k, v, o, lse, mask, bias, alibi_slopes, sinks, cu_q, cu_q if cu_k is None else cu_k, philox
    )
    if notes is not None:
        notes.spec = spec
    return o, lse


def _fake(q, *args):
    return _outputs(_check(q, *args[:-2]), q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.scalars = inputs[10:]


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    o, lse, *tensors = ctx.saved_tensors
    nothing = (None,) * (_NUM_FORWARD - 3)
    if do is None and dlse is None:
        return (None, None, None, *nothing)
    needs_dbias, needs_dsinks = wants_gradient(ctx, _BIAS), wants_gradient(ctx, _SINKS)
    do = torch.zeros_like(o) if do is None else do
    args = (do, dlse, o, lse, *tensors, *ctx.scalars, needs_dbias, needs_dsinks)
    if plain(ctx, do, dlse, *tensors):
        dq, dk, dv, dbias, dsinks = _compute_gradients(ctx.spec, *args)
    else:
        dq, dk, dv, dbias, dsinks = attention_bwd(*args)
    gradients = [dq, dk, dv, *nothing]
    if needs_dbias:
        gradients[_BIAS] = dbias
    if needs_dsinks:
        gradients[_SINKS] = dsinks
    return tuple(gradients)


def _check_backward(do, dlse, o, lse, q, *args) -> AttentionSpec:
    spec = _check(q, *args[:-4])
    rows = (q.shape[0],) if spec.packed else (spec.batch, spec.seqlen_q)
    lse_rows = (spec.nheads, *rows) if spec.packed else (spec.batch, spec.nheads, spec.seqlen_q)
    for name, t in (("do", do), ("o", o)):
        same_device("attention_bwd", name, t, "q", q.device)
        same_dtype("attention_bwd", name, t, "q", q.dtype)
        shape("attention_bwd", name, t, (*rows, spec.nheads, spec.headdim_v), "of the output")
    for name, t in (("lse", lse), ("dlse", dlse)):
        if t is not None:
            same_dtype("attention_bwd", name, t, "the statistics", _statistics(q))
            shape("attention_bwd", name, t, lse_rows, "of lse")
    return spec


def _gradient(t: Tensor) -> Tensor:
    return torch.empty_like(t) if t.is_contiguous() and t.numel() < _LARGE else _new(t, *t.shape)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, sinks: Any, needs_dbias: bool, needs_dsinks: bool
) -> tuple[Any, ...]:
    """dq, dk, dv uninitialised and contiguous; dbias and dsinks in the statistics dtype, zeroed, or None."""
    wide = _statistics(q)
    dbias = q.new_zeros(bias.shape, dtype=wide) if needs_dbias else None
    dsinks = q.new_zeros(sinks.shape, dtype=wide) if needs_dsinks else None
    return _gradient(q), _gradient(k), _gradient(v), dbias, dsinks


def _returned(gradient: Tensor | None, like: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if gradient is None else gradient.to(like.dtype)  # type: ignore[union-attr]


def _unit_last(t: Tensor) -> Tensor:
    """A gradient from autograd may be expanded; kernels read rows."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _bwd_forward(*args):
    dq, dk, dv, dbias, dsinks = _compute_gradients(_check_backward(*args), *args)
    nothing = args[4].new_empty
    return dq, dk, dv, nothing(0) if dbias is None else dbias, nothing(0) if dsinks is None else dsinks


def _compute_gradients(
    spec, do, dlse, o, lse, q, k, v, mask, bias, alibi_slopes, sinks, cu_q, cu_k, philox, max_q, max_k, left, right,
    upper_left, scale, softcap, dropout_p, deterministic, backend, needs_dbias, needs_dsinks,
):  # fmt: skip
    if torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic:
        spec = spec._replace(deterministic=True)
    chosen = choose("attention_bwd", BACKENDS, spec, backend)
    dq, dk, dv, dbias, dsinks = _gradients(q, k, v, bias, sinks, needs_dbias, needs_dsinks)
    chosen.impl.backward(
        spec, _unit_last(do), None if dlse is None else _unit_last(dlse), q, k, v, _unit_last(o), _unit_last(lse),
        mask, bias, alibi_slopes, sinks, cu_q, cu_q if cu_k is None else cu_k, philox, dq, dk, dv, dbias, dsinks,
    )  # fmt: skip
    dbias = None if dbias is None else dbias.to(bias.dtype)
    return dq, dk, dv, dbias, None if dsinks is None else dsinks.to(sinks.dtype)


def _bwd_fake(do, dlse, o, lse, q, k, v, mask, bias, alibi_slopes, sinks, *args):
    _check_backward(do, dlse, o, lse, q, k, v, mask, bias, alibi_slopes, sinks, *args)
    dq, dk, dv, dbias, dsinks = _gradients(q, k, v, bias, sinks, *args[-2:])
    return dq, dk, dv, _returned(dbias, bias, q), _returned(dsinks, sinks, q)


def _pair_flops(q: Any, k: Any, v: Any) -> tuple[int, int]:
    """Pairs times headdim, and times headdim_v. A packed call counts as sequences of equal length would."""
    pairs = q[-2] * (q[0] * k[0] if len(q) == 3 else q[0] * q[1] * k[1])
    return pairs * q[-1], pairs * v[-1]


def _flops(q, k, v, mask, bias, alibi_slopes, sinks, cu_q, *_args, **_kwargs) -> int:
    """2 multiply-adds per pair and column, like torch's formula for SDPA: masks are not subtracted."""
    scores, values = _pair_flops(q, k, v)
    return 2 * (scores + values) // max(1, 1 if cu_q is None else cu_q[0] - 1)


def _bwd_flops(do, dlse, o, lse, q, k, v, mask, bias, alibi_slopes, sinks, cu_q, *_args, **_kwargs) -> int:
    scores, values = _pair_flops(q, k, v)
    return 2 * (3 * scores + 2 * values) // max(1, 1 if cu_q is None else cu_q[0] - 1)


attention_bwd = Op(
    f"attention_bwd(Tensor do, Tensor? dlse, Tensor o, Tensor lse, {_FORWARD}, bool needs_dbias, bool needs_dsinks) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_forward,
    _bwd_fake,
    flops=_bwd_flops,
)
attention_fwd = Op(
    f"attention_fwd({_FORWARD}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    save=_save,
    backward=_backward,
    flops=_flops,
    notes=True,
)


def _check_weights(
    q, k, lse, mask, bias, alibi_slopes, left, right, upper_left, scale, softcap, *_backend
) -> AttentionSpec:
    op = "attention_weights"
    spec = check_attention(
        q,
        k,
        k,
        mask,
        bias,
        alibi_slopes,
        None,
        None,
        None,
        None,
        None,
        left,
        right,
        upper_left,
        scale,
        softcap,
        0.0,
        op=op,
    )
    same_device(op, "lse", lse, "q", q.device)
    same_dtype(op, "lse", lse, "statistics", _statistics(q))
    shape(op, "lse", lse, (spec.batch, spec.nheads, spec.seqlen_q), "[batch, nheads, seqlen_q]")
    return spec


def _new_weights(spec: AttentionSpec, q: Tensor) -> Tensor:
    return q.new_empty(spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)


def _weights_forward(q, k, lse, mask, bias, alibi_slopes, left, right, upper_left, scale, softcap, backend):
    spec = _check_weights(q, k, lse, mask, bias, alibi_slopes, left, right, upper_left, scale, softcap)
    chosen = choose("attention_weights", WEIGHTS, spec, backend)
    out = _new_weights(spec, q)
    chosen.impl.weights(spec, q, k, _unit_last(lse), mask, bias, alibi_slopes, out)
    return out


def _weights_fake(q, *args):
    return _new_weights(_check_weights(q, *args), q)


def _weights_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scalars = inputs[6:11]


def _weights_backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 12
    needs_dbias = wants_gradient(ctx, _BIAS)
    dq, dk, dlse, dbias = attention_weights_bwd(dout, *ctx.saved_tensors, *ctx.scalars, needs_dbias)
    return dq, dk, dlse, None, dbias if needs_dbias else None, *(None,) * 7


def _weights_gradients(q, k, lse, bias, needs_dbias):
    dbias = q.new_zeros(bias.shape, dtype=_statistics(q)) if needs_dbias else None
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(lse.shape, dtype=lse.dtype), dbias


def _weights_bwd_forward(dout, q, k, lse, mask, bias, alibi_slopes, *args):
    spec = _check_weights(q, k, lse, mask, bias, alibi_slopes, *args[:-1])
    dq, dk, dlse, dbias = _weights_gradients(q, k, lse, bias, args[-1])
    _reference.weights_backward(spec, dout, q, k, lse, mask, bias, alibi_slopes, dq, dk, dlse, dbias)
    return dq, dk, dlse, _returned(dbias, bias, q)


def _weights_bwd_fake(dout, q, k, lse, mask, bias, alibi_slopes, *args):
    _check_weights(q, k, lse, mask, bias, alibi_slopes, *args[:-1])
    dq, dk, dlse, dbias = _weights_gradients(q, k, lse, bias, args[-1])
    return dq, dk, dlse, _returned(dbias, bias, q)


_WEIGHTS = f"Tensor q, Tensor k, Tensor lse, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, {_OPTIONS}"
attention_weights_bwd = Op(
    f"attention_weights_bwd(Tensor dout, {_WEIGHTS}, bool needs_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    _weights_bwd_forward,
    _weights_bwd_fake,
)
attention_weights = Op(
    f"attention_weights({_WEIGHTS}, str? backend) -> Tensor",
    _weights_forward,
    _weights_fake,
    save=_weights_save,
    backward=_weights_backward,
)


def _kvcache_outputs(q: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, nheads, _ = q.shape
    o = q.new_empty(batch, seqlen_q, nheads, v_cache.shape[3])
    return o, q.new_empty(batch, nheads, seqlen_q, dtype=_statistics(q))


def _kvcache_forward(
    q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, alibi_slopes, sinks, interleaved, left, right,
    upper_left, scale, softcap, num_splits, backend,
):  # fmt: skip
    spec = check_kvcache(
        q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, alibi_slopes, sinks, interleaved, left, right,
        upper_left, scale, softcap, num_splits,
    )  # fmt: skip
    chosen = choose("attention_kvcache", BACKENDS, spec, backend)
    o, lse = _kvcache_outputs(q, v_cache)
    chosen.impl.kvcache(
        spec, q, k_cache, v_cache, cache_seqlens, k, v, block_table, cos, sin, alibi_slopes, sinks, o, lse
    )
    if k is not None:
        torch.autograd.graph.increment_version((k_cache, v_cache))  # the native code wrote behind autograd's back
    return o, lse


def _kvcache_fake(q, k_cache, v_cache, *args):
    check_kvcache(q, k_cache, v_cache, *args[:-1])
    return _kvcache_outputs(q, v_cache)


def _kvcache_schema(name: str, mark: str) -> str:
    return (
        f"{name}(Tensor q, Tensor{mark.format('a')} k_cache, Tensor{mark.format('b')} v_cache, Tensor cache_seqlens, "
        "Tensor? k, Tensor? v, Tensor? block_table, Tensor? cos, Tensor? sin, Tensor? alibi_slopes, Tensor? sinks, "
        f"bool interleaved, {_OPTIONS}, SymInt? num_splits, str? backend) -> (Tensor, Tensor)"
    )


attention_kvcache = Op(_kvcache_schema("attention_kvcache", ""), _kvcache_forward, _kvcache_fake)
attention_kvcache_append = Op(_kvcache_schema("attention_kvcache_append", "({}!)"), _kvcache_forward, _kvcache_fake)
