"""Rows under trial: what a benchmark, an audit or a test puts in the place of a table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Trial:
    """`with tried(row):` makes every call within use that row, which must cover its heads; of several rows the one of its kind.

    All threads see it, because autograd computes gradients in one of its own. Plans are kept by `rows` too.
    """

    def __init__(self) -> None:
        self.rows: tuple[Any, ...] = ()

    @contextlib.contextmanager
    def __call__(self, *rows: Any) -> Iterator[None]:
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before
