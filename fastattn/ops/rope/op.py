"""The operators fastattn::rope and fastattn::rope_qk. The backward of a rotation is the one by the negative angle."""

from __future__ import annotations

import torch

from fastattn.ops._dispatch import choose
from fastattn.ops._norm import unit_last
from fastattn.ops._op import Op, plain
from fastattn.ops.rope.backends import BACKENDS
from fastattn.ops.rope.spec import check_rope


def _forward(x, cos, sin, position_ids, interleaved, inverse, backend, notes=None):
    spec = check_rope("rope", x, None, cos, sin, position_ids, interleaved)
    if notes is not None:
        notes.spec = spec
    return _rotate(spec, x, cos, sin, position_ids, interleaved, inverse, backend)


def _rotate(spec, x, cos, sin, position_ids, interleaved, inverse, backend):
    impl = choose("rope", BACKENDS, spec, backend).impl
    return impl.forward("rope", x, None, cos, sin, position_ids, interleaved, inverse)[0]


def _fake(x, cos, sin, position_ids, interleaved, inverse, backend):
    check_rope("rope", x, None, cos, sin, position_ids, interleaved)
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    _, cos, sin, position_ids, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, position_ids)


def _backward(ctx, dy):
    unused = (None,) * 6
    if dy is None:
        return None, *unused
    interleaved, inverse, backend = ctx.options
    args = (unit_last(dy), *ctx.saved_tensors, interleaved, not inverse, backend)
    return _rotate(ctx.spec, *args) if plain(ctx, *args[:4]) else rope(*args), *unused


def _forward_qk(q, k, cos, sin, position_ids, interleaved, inverse, backend, notes=None):
    spec = check_rope("rope_qk", q, k, cos, sin, position_ids, interleaved)
    if notes is not None:
        notes.spec = spec
    return _rotate_qk(spec, q, k, cos, sin, position_ids, interleaved, inverse, backend)


def _rotate_qk(spec, q, k, cos, sin, position_ids, interleaved, inverse, backend):
    impl = choose("rope_qk", BACKENDS, spec, backend).impl
    return impl.forward("rope_qk", q, k, cos, sin, position_ids, interleaved, inverse)


def _fake_qk(q, k, cos, sin, position_ids, interleaved, inverse, backend):
    check_rope("rope_qk", q, k, cos, sin, position_ids, interleaved)
    return torch.empty_like(q), torch.empty_like(k)


def _save_qk(ctx, inputs, output):
    _, _, cos, sin, position_ids, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, position_ids)


def _backward_qk(ctx, dq, dk):
    unused = (None,) * 6
    interleaved, inverse, backend = ctx.options
    rotation = (*ctx.saved_tensors, interleaved, not inverse, backend)
    if dq is None or dk is None:  # one of them was not used
        dq, dk = (None if d is None else rope(unit_last(d), *rotation) for d in (dq, dk))
        return dq, dk, *unused
    args = (unit_last(dq), unit_last(dk), *rotation)
    return *(_rotate_qk(ctx.spec, *args) if plain(ctx, *args[:5]) else rope_qk(*args)), *unused


rope = Op(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse, str? backend) "
    "-> Tensor",
    _forward,
    _fake,
    save=_save,
    backward=_backward,
    notes=True,
)
rope_qk = Op(
    "rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse, "
    "str? backend) -> (Tensor, Tensor)",
    _forward_qk,
    _fake_qk,
    save=_save_qk,
    backward=_backward_qk,
    notes=True,
)
