"""Op: one schema, one forward, one fake and one backward that serve eager, autograd, torch.compile and export.

Plain eager tensors take a direct road (an `autograd.Function` when gradients are wanted): the dispatcher costs more than
our checks. Everything else (torch.compile, export, torch.jit.trace, fake tensors, functorch, dispatch modes such as
FlopCounterMode, tensor subclasses) takes the registered overload `torch.ops.fastattn.<name>`, an opaque node. Both roads
run the same functions, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fastattn.ops._check import is_tensor

_library = torch.library.Library("fastattn", "FRAGMENT")
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
# The hooks on saved tensors that are in place, or None; before torch 2.7 nobody can tell.
_saved_tensor_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: "unknown")
_jit_tracing = torch._C._is_tracing
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_grad_enabled = torch.is_grad_enabled
_plain_types = (torch.Tensor, torch.nn.Parameter)
_plain_or_absent = frozenset((*_plain_types, type(None)))


class Op:
    """An operator `fastattn::<name>`.

    schema      `name(Tensor q, Tensor? mask, ...) -> (Tensor, Tensor)`, the schema language of torch.library
    forward     the real thing: validates, allocates, picks a backend, returns what the schema says
    fake        the same validation and allocation, no data; its strides are those of `forward`
    save        `save(ctx, inputs, output)` keeps what backward needs; absent if the op has no gradient
    backward    `backward(ctx, *grads)` returns one gradient (or None) per argument; a missing grad arrives as None
    flops       `flops(*input_shapes_and_scalars, out_shape=...)` for torch.utils.flop_counter
    notes       on the direct road `forward` may get the ctx as one argument more, and leave its specification there as
                `ctx.spec` (None: a native call checked it all), for a backward that asks `plain`
    """

    def __init__(
        self,
        schema: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        flops: Callable[..., int] | None = None,
        notes: bool = False,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self._forward = forward
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, forward, "CompositeExplicitAutograd")
        qualified = f"fastattn::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_library)
        self.overload = getattr(torch.ops.fastattn, self.name).default
        kept = _save_nothing if save is None else save
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=_saving(kept), lib=_library)
        self._functorch: Any = None
        if not self.overload._schema.is_mutable:
            # functorch would let the gradient of an op without a derivative be zero
            self._functorch = _make_functorch(self, kept, _refusing(self.name) if backward is None else backward)
        arguments = self.overload._schema.arguments
        self._tensors = tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
        self._names = [a.name for a in arguments]
        self._function = None
        self._apply: Any = None
        if backward is not None:
            self._function = _make_function(self.name, forward, save, backward, notes)
            # Function.apply in Python looks at every argument for what `__call__` knows: 3 µs
            self._apply = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]
        torch.library.register_vmap(qualified, _vmap_by_loop(self), lib=_library)
        if flops is not None:
            register_flop_formula(self.overload.overloadpacket)(flops)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _dispatch_modes() or _jit_tracing():
            return self.overload(*args)
        if _functorch_active() or forward_ad._current_level >= 0:  # where torch says what has no derivative
            return self.overload(*args) if self._functorch is None else self._functorch.apply(*args)
        wants_grad = False
        for i in self._tensors:
            tensor = args[i]
            if tensor is not None:
                if type(tensor) not in _plain_types or tensor.is_meta:
                    is_tensor(self.name.removesuffix("_fwd"), self._names[i], tensor)
                    return self.overload(*args)
                wants_grad = wants_grad or tensor.requires_grad
        if wants_grad and self._function is not None and torch.is_grad_enabled():
            apply, leading = self._apply, 0
            for i in self._tensors:
                tensor = args[i]
                if tensor is not None:
                    leading = i + 1
                    if _unwrap_if_dead(tensor) is not tensor:  # it has left its functorch transform
                        apply = self._function.apply
            return apply(*args[:leading], args[leading:])
        return self._forward(*args)


def plain(ctx: Any, *tensors: torch.Tensor | None) -> bool:
    """May a backward compute at once with what its forward noted in ctx.spec, without another Op? Where nothing traces
    and no tensor is of a subclass: autograd has checked the incoming gradients, the forward everything else."""
    if not hasattr(ctx, "spec") or torch.compiler.is_compiling() or _dispatch_modes() or _functorch_active():
        return False
    return _plain_or_absent.issuperset(map(type, tensors))


def _saving(save: Callable[..., None]) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    return setup_context


def wants_gradient(ctx: Any, i: int) -> bool:
    """In `backward`: does argument i need its gradient? The last ones may be missing from ctx, being no tensors."""
    wanted = ctx.needs_input_grad
    return i < len(wanted) and wanted[i]


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For operations without a derivative."""


def _refusing(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: its derivative is not implemented; fastattn.reference has derivatives of any order"
        )

    return backward


class _Constant(torch.autograd.Function):
    """The first `count` tensors as they are; who differentiates them with respect to the others is refused."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Any) -> Any:
        ctx.name = name
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _refusing(f"the gradient of {ctx.name}")(ctx)


def _make_function(name: str, forward: Any, save: Any, backward: Any, notes: bool) -> type[torch.autograd.Function]:
    """A Function with a ctx-style forward: a static setup_context costs 13 µs more per call.

    It is applied to the arguments up to the last tensor and one tuple of the others: each argument of its own costs 0.8 µs.
    """

    def apply_forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        inputs = args[:-1] + args[-1]
        # with hooks on saved tensors (offloading, compression) backward gets others than were saved, and checks them itself
        output = forward(*inputs, ctx) if notes and _saved_tensor_hooks(True) is None else forward(*inputs)
        save(ctx, inputs, output)
        return output

    def gradients(ctx: Any, *grads: Any) -> Any:
        return (*backward(ctx, *grads)[: len(ctx.needs_input_grad) - 1], None)

    def apply_backward(ctx: Any, *grads: Any) -> Any:
        if not _grad_enabled():
            return gradients(ctx, *grads)
        with torch.no_grad():
            found = gradients(ctx, *grads)
        # torch's once_differentiable looks at grads alone, and lets gradients that depend on the inputs pass for constants
        depends_on = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return _Constant.apply(name, len(found), *found, *depends_on) if depends_on else found

    namespace = {"forward": staticmethod(apply_forward), "backward": staticmethod(apply_backward)}
    return type(f"fastattn_{name}", (torch.autograd.Function,), namespace)  # the name a profiler shows


def _make_functorch(op: Op, save: Any, backward: Any) -> type[torch.autograd.Function]:
    """The Function that torch.func.grad and its kin can differentiate; registered ops cannot be, as of torch 2.13."""
    namespace = {
        "forward": staticmethod(lambda *args: op.overload(*args)),
        "setup_context": staticmethod(_saving(save)),
        "backward": staticmethod(backward),
        "vmap": staticmethod(_vmap_by_loop(op)),
    }
    return type(f"fastattn_{op.name}", (torch.autograd.Function,), namespace)


def _vmap_by_loop(op: Op) -> Callable[..., Any]:
    """torch.func.vmap: one call per slice. The batch dimension of every op here is already parallel inside the kernel."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def slice_of(arg: Any, dim: int | None, i: int) -> Any:
            return arg if dim is None else arg.select(dim, i)

        outputs = [
            op.overload(*(slice_of(a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(None if part[0] is None else torch.stack(part) for part in zip(*outputs, strict=True))
        return stacked, tuple(None if part is None else 0 for part in stacked)

    return rule
