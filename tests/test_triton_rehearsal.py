"""Every Triton kernel through Triton's own compiler and launcher, on a driver that notes what it is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="no C and C++ compilers")
def test_every_kernel_is_launched_as_it_was_asked_for(tmp_path):
    """In a process of its own: this one may have chosen the interpreter, and its torch must not find the stub's driver."""
    script = Path(__file__).with_name("triton_rehearsal.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    launches, faults = map(int, re.findall(r"(\d+) launches, (\d+) faults", done.stdout)[0])
    assert launches >= 60 and not faults
