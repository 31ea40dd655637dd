"""A process for calls that may never return: a kernel that hangs the GPU, or leaves it unusable, takes only that process along."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_START = 600.0  # seconds for a process to import what it needs, however busy the machine is


class LostError(RuntimeError):
    """The process ended or was silent for too long. `last` is the last thing that it told, or None."""

    def __init__(self, reason: str, last: Any) -> None:
        super().__init__(reason)
        self.last = last


class Worker:
    """`worker(*args)` is `function(tell, *args)` in a process of its own, started when needed and kept for further calls.

    patience    seconds without a word (`tell(note)`, or the result) after which the process is ended, once it has started
    """

    def __init__(self, function: Callable[..., Any], patience: float) -> None:
        self._function, self._patience = function, patience
        self._process: Any = None
        self._connection: Any = None

    def __call__(self, *args: Any) -> Any:
        starting = self._process is None
        if starting:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
            self._process.start()
            theirs.close()
        last, reason = None, ""
        try:
            self._connection.send(args)
            while self._connection.poll(patience := _START if starting else self._patience):
                finished, value = self._connection.recv()
                starting = False
                if finished:
                    return value
                last = value
            reason = f"no word for {patience:.0f} s"
        except (EOFError, OSError):
            reason = "the process ended"
        self.stop()
        raise LostError(reason, last)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    connection.send((False, None))  # it has started
    while True:
        args = connection.recv()
        connection.send((True, function(lambda note: connection.send((False, note)), *args)))
