"""What every test runs under: NaN-poisoned torch.empty, fixed seeds, and the thread count put back afterwards.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; it must be chosen before they are imported.
The CUDA C++ kernels run in the emulator there, when the machine has the compiler for it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis.internal.conjecture import providers
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastattn import UnsupportedError
from fastattn.runtime import cuda, launch, native

if launch.INTERPRETED:
    import interpreter

    interpreter.mend()

if not torch.cuda.is_available():
    import emulator

    if emulator.available():
        cuda.emulator = emulator.run


# A twentieth of what hypothesis draws are constants of whichever of our modules are imported so far: the calls of a
# derandomized test would depend on the tests before it, and on every number in the code.
providers._get_local_constants = lambda: providers._local_constants

_LONGEST = ("test_sanitize.py", "test_packaging.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compiles for minutes goes first: no process is to wait for it at the end."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


_device_constructors()  # remembers what `with torch.device` moves: torch's own torch.empty, before ours takes its place


def _poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(create)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = create(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and not t.requires_grad else t

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever forgets to write an element of its output gives NaN, not yesterday's right answer."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    if native.error() is None:  # outputs that the native doors allocate themselves
        native.module().poison_outputs(True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def forced(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`function` on that backend; the test is skipped with the objection when it does not take the call."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, backend=backend, **kwargs)
        except UnsupportedError as refusal:
            pytest.skip(str(refusal))

    return call
