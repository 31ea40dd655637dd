"""Builds the native module with sanitizers into build/sanitize and runs tests on it: `python tests/sanitize.py [tests ...]`.

AddressSanitizer must be loaded before Python, hence a child process with LD_PRELOAD. Torch allocates through malloc, so
reads and writes outside a tensor are caught too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"


def build() -> None:
    environment = {**os.environ, "FASTATTN_SANITIZE": FLAGS, "FASTATTN_REQUIRE_NATIVE": "1"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def run(tests: list[str]) -> int:
    asan = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": asan,
        "PYTHONPATH": str(BUILD / "lib"),
        # Python and torch keep memory until the end by design; everything else stops at the first finding.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    pytest = str(Path(sys.executable).with_name("pytest"))
    return subprocess.run([pytest, "-p", "no:cacheprovider", *tests], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    build()
    sys.exit(run(sys.argv[1:] or ["tests/test_native_memory.py"]))
