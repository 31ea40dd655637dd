"""The operators fastattn::layer_norm_fwd and fastattn::layer_norm_bwd."""

from __future__ import annotations

import torch

from fastattn.ops._dispatch import choose
from fastattn.ops._norm import short_backward, short_forward, unit_last
from fastattn.ops._op import Op, plain, wants_gradient
from fastattn.ops.layer_norm.backends import BACKENDS
from fastattn.ops.layer_norm.spec import check_layer_norm


def _forward(x, weight, bias, residual, eps, backend, notes=None):
    if found := short_forward(notes, backend, x, weight, bias, residual, eps, centred=True):
        return found
    spec = check_layer_norm(x, weight, bias, residual, eps)
    if notes is not None:
        notes.spec = spec
    return choose("layer_norm", BACKENDS, spec, backend).impl.forward(x, weight, bias, residual, eps)


def _fake(x, weight, bias, residual, eps, backend):
    check_layer_norm(x, weight, bias, residual, eps)
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y, total, mean, rstd


def _save(ctx, inputs, output):
    x, weight, bias, _, ctx.eps, ctx.backend = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if total is None else total, weight, bias, mean, rstd)
    ctx.added = total is not None


def _backward(ctx, dy, dsum, _mean, _rstd):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:  # only x + residual was used
        return dsum, None, None, dsum if ctx.added else None, None, None
    args = (
        unit_last(dy), unit_last(dsum), x, weight, bias, mean, rstd, ctx.eps, wants_gradient(ctx, 1),
        wants_gradient(ctx, 2), ctx.backend,
    )  # fmt: skip
    found = None
    if plain(ctx, dy, dsum, x, weight, bias, mean, rstd):
        found = short_backward(*args[:7], *args[8:10]) if ctx.spec is None else _compute_gradients(ctx.spec, *args)
    dx, dweight, dbias = found or layer_norm_bwd(*args)
    return dx, dweight, dbias, dx if ctx.added else None, None, None


def _backward_forward(dy, dsum, x, weight, bias, mean, rstd, eps, wants_dweight, wants_dbias, backend):
    spec = check_layer_norm(x, weight, bias, None, eps)
    return _compute_gradients(spec, dy, dsum, x, weight, bias, mean, rstd, eps, wants_dweight, wants_dbias, backend)


def _compute_gradients(spec, dy, dsum, x, weight, bias, mean, rstd, eps, wants_dweight, wants_dbias, backend):
    impl = choose("layer_norm", BACKENDS, spec, backend).impl
    return impl.backward(dy, dsum, x, weight, bias, mean, rstd, eps, wants_dweight, wants_dbias)


def _backward_fake(dy, dsum, x, weight, bias, mean, rstd, eps, wants_dweight, wants_dbias, backend):
    dweight = torch.empty_like(weight) if wants_dweight else None
    dbias = torch.empty_like(bias) if wants_dbias else None
    return x.new_empty(x.shape), dweight, dbias


layer_norm_bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "float eps, bool wants_dweight, bool wants_dbias, str? backend) -> (Tensor, Tensor, Tensor)",
    _backward_forward,
    _backward_fake,
)
layer_norm_fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    save=_save,
    backward=_backward,
    notes=True,
)
