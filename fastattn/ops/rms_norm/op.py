"""The operators fastattn::rms_norm_fwd and fastattn::rms_norm_bwd."""

from __future__ import annotations

import torch

from fastattn.ops._dispatch import choose
from fastattn.ops._norm import short_backward, short_forward, unit_last
from fastattn.ops._op import Op, plain, wants_gradient
from fastattn.ops.rms_norm.backends import BACKENDS
from fastattn.ops.rms_norm.spec import check_rms_norm


def _forward(x, weight, residual, eps, weight_offset, rounding, backend, notes=None):
    options = {"centred": False, "weight_offset": weight_offset, "rounding": rounding}
    if found := short_forward(notes, backend, x, weight, None, residual, eps, **options):
        y, total, _, rstd = found
        return y, total, rstd
    spec = check_rms_norm(x, weight, residual, eps, weight_offset, rounding)
    if notes is not None:
        notes.spec = spec
    impl = choose("rms_norm", BACKENDS, spec, backend).impl
    return impl.forward(x, weight, residual, eps, weight_offset, rounding)


def _fake(x, weight, residual, eps, weight_offset, rounding, backend):
    check_rms_norm(x, weight, residual, eps, weight_offset, rounding)
    total = None if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, _, ctx.eps, ctx.weight_offset, ctx.rounding, ctx.backend = inputs
    _, total, rstd = output
    ctx.save_for_backward(x if total is None else total, weight, rstd)
    ctx.added = total is not None


def _backward(ctx, dy, dsum, _rstd):
    x, weight, rstd = ctx.saved_tensors
    options = (None, None, None, None)
    if dy is None:  # only x + residual was used
        return dsum, None, dsum if ctx.added else None, *options
    args = (
        unit_last(dy), unit_last(dsum), x, weight, rstd, ctx.eps, ctx.weight_offset, ctx.rounding, wants_gradient(ctx, 1),
        ctx.backend,
    )  # fmt: skip
    found = None
    if plain(ctx, dy, dsum, x, weight, rstd):
        if ctx.spec is not None:
            found = _compute_gradients(ctx.spec, *args)
        elif short := short_backward(*args[:4], None, None, rstd, args[8], False, ctx.weight_offset):
            found = short[:2]
    dx, dweight = found or rms_norm_bwd(*args)
    return dx, dweight, dx if ctx.added else None, *options


def _backward_forward(dy, dsum, x, weight, rstd, eps, weight_offset, rounding, wants_dweight, backend):
    spec = check_rms_norm(x, weight, None, eps, weight_offset, rounding)
    return _compute_gradients(spec, dy, dsum, x, weight, rstd, eps, weight_offset, rounding, wants_dweight, backend)


def _compute_gradients(spec, dy, dsum, x, weight, rstd, eps, weight_offset, rounding, wants_dweight, backend):
    impl = choose("rms_norm", BACKENDS, spec, backend).impl
    return impl.backward(dy, dsum, x, weight, rstd, eps, weight_offset, rounding, wants_dweight)


def _backward_fake(dy, dsum, x, weight, rstd, eps, weight_offset, rounding, wants_dweight, backend):
    return x.new_empty(x.shape), torch.empty_like(weight) if wants_dweight else None


rms_norm_bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor rstd, float eps, float weight_offset, "
    "str rounding, bool wants_dweight, str? backend) -> (Tensor, Tensor)",
    _backward_forward,
    _backward_fake,
)
rms_norm_fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor? weight, Tensor? residual, float eps, float weight_offset, str rounding, "
    "str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    save=_save,
    backward=_backward,
    notes=True,
)
