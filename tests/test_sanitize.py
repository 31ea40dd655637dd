"""Short runs of the kernels under the sanitizers; `make sanitize` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.runtime import native

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or native.error() is not None, reason="needs gcc's sanitizers and the native module"
)
@pytest.mark.parametrize("options", [[], ["--thread"]], ids=["address and undefined", "thread"])
def test_short_run(options: list[str]) -> None:
    best = native.module().isas()[-1]
    tests = [str(TESTS / "test_native_memory.py"), "-q", "-x", "-k", best]
    command = [sys.executable, str(TESTS / "sanitize.py"), *options, *tests]
    environment = {**os.environ, "FASTATTN_BUILD_ISAS": best}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
