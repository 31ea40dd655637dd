"""For pytest on a GPU: a process whose GPU is lost ends, so that pytest-xdist reports its test and starts another process."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch

LOST = 70  # the status of such a process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError as loss:  # an illegal access, say: every later call of this process would fail as well
            print(f"{item.nodeid}: {report.longreprtext}\nthe GPU is lost: {loss}", file=sys.stderr, flush=True)
            os._exit(LOST)
    return report
