"""Which backend takes a call, and why the others do not. Nothing falls back in silence."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from fastattn.runtime import env


class UnsupportedError(NotImplementedError):
    """The call is valid, but no backend takes it; the message lists every backend's reasons."""


@dataclass(frozen=True)
class Backend:
    """name, the module that runs it (imported on first use), and `objections(spec)`: why it will not take a call."""

    name: str
    module: str
    objections: Callable[[Any], Sequence[str]]
    tuning: Callable[[Any], object] | None = None
    _loaded: list[ModuleType] = field(default_factory=list, repr=False, compare=False)

    @property
    def impl(self) -> ModuleType:
        if not self._loaded:
            self._loaded.append(importlib.import_module(self.module))
        return self._loaded[0]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the specification of the call and, per backend, its objections. Prints as a table."""

    op: str
    spec: Any
    chosen: str | None
    tuning: object
    objections: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.spec}"]
        for name, reasons in self.objections.items():
            if name == self.chosen:
                row = "" if self.tuning is None else f" with {self.tuning}"
                lines.append(f"  {name}: takes it{row}")
            else:
                lines.append(f"  {name}: {'; '.join(reasons) or 'could take it, comes later in the order'}")
        return "\n".join(lines)

    __repr__ = __str__


class _Explained(BaseException):
    """Carries the explanation out of the op before anything is computed."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_scoped_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastattn_backend", default=None)
_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("fastattn_explaining", default=False)
_known = frozenset({"cuda", "triton", "cpu", "reference"})


def forced_backend(backend: str | None) -> str | None:
    """The backend a call is forced to: its own argument, else `use_backend`, else FASTATTN_BACKEND, else None.

    A trace cannot read the scope of `use_backend`; `choose` reads it when the compiled code runs.
    """
    if torch.compiler.is_compiling():
        return backend or env.BACKEND
    return backend or _scoped_backend.get() or env.BACKEND


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for every call in the block: "cuda", "triton", "cpu" or "reference"; None lifts the force.

    A backend that objects raises UnsupportedError. Backward passes run on the backend of their forward.
    """
    if name is not None and name not in _known:
        raise ValueError(f"use_backend: name must be one of {sorted(_known)} or None, got {name!r}")
    token = _scoped_backend.set(name)
    try:
        yield
    finally:
        _scoped_backend.reset(token)


def choose(op: str, backends: Sequence[Backend], spec: Any, forced: str | None) -> Backend:
    """The first backend without objections, or the forced one. Raises UnsupportedError with everybody's reasons."""
    forced = forced or _scoped_backend.get()
    if _explaining.get():
        raise _Explained(_explanation(op, backends, spec, forced))
    if forced is None:
        for backend in backends:
            if not backend.objections(spec):
                return backend
    else:
        for backend in backends:
            if backend.name == forced and not backend.objections(spec):
                return backend
        if _refusals is not None:
            _refusals.append(_refusal(op, backends, spec, forced))
            return backends[-1]
    raise UnsupportedError(_refusal(op, backends, spec, forced))


_refusals: list[str] | None = None


@contextlib.contextmanager
def collecting_refusals() -> Iterator[list[str]]:
    """Within the block a call that the forced backend refuses goes to the reference, and its refusal into the list: for
    recordings of whole models (`fastattn warmup`), where nothing else can serve the tensors that stand for a GPU's."""
    global _refusals
    before, _refusals = _refusals, []
    try:
        yield _refusals
    finally:
        _refusals = before


def _explanation(op: str, backends: Sequence[Backend], spec: Any, forced: str | None) -> Explanation:
    objections = {b.name: tuple(b.objections(spec)) for b in backends}
    if forced is not None:
        for b in backends:
            if b.name != forced:
                objections[b.name] = (*objections[b.name], f"backend {forced!r} is forced")
    chosen = next((b for b in backends if not objections[b.name]), None)
    tuning = chosen.tuning(spec) if chosen is not None and chosen.tuning is not None else None
    return Explanation(op, spec, chosen.name if chosen else None, tuning, objections)


def _refusal(op: str, backends: Sequence[Backend], spec: Any, forced: str | None) -> str:
    if forced is not None and all(b.name != forced for b in backends):
        names = ", ".join(b.name for b in backends)
        return f"{op}: backend must be one of those this operation has ({names}), got {forced!r}"
    head = (
        f"{op}: no backend takes this call" if forced is None else f"{op}: backend {forced!r} does not take this call"
    )
    lines = [f"{head}: {spec}"]
    lines += [f"  {b.name}: {'; '.join(b.objections(spec)) or 'no objection'}" for b in backends]
    return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Who would take `function(*args, **kwargs)`, with which tuning row, and why the others would not.

    Validates the call like the call itself, computes nothing.
    >>> print(fastattn.explain(fastattn.attention, q, k, v, causal=True))
    """
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Explained as found:
        return found.explanation
    finally:
        _explaining.reset(token)
    name = getattr(function, "__name__", repr(function))
    raise ValueError(f"explain: function must be a fastattn operation that chooses a backend, got {name}")
