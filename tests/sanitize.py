"""Builds the native module with sanitizers into build/ and runs tests on it: `python tests/sanitize.py [tests ...]`.

A sanitizer must be loaded before Python, hence a child process with LD_PRELOAD. Torch allocates through malloc, so reads
and writes outside a tensor are caught too. With --thread it is ThreadSanitizer, else AddressSanitizer and
UndefinedBehaviourSanitizer.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer -O1 -g1",
}
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python and torch keep memory until the end by design; everything else stops at the first finding.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
}


def build(kind: str) -> Path:
    """The folder to import from."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FASTATTN_SANITIZE": FLAGS[kind], "FASTATTN_REQUIRE_NATIVE": "1"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(folder),
        "--build-lib",
        str(folder / "lib"),
    ]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may build the same
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "lib"


def run(kind: str, tests: list[str]) -> int:
    lib = build(kind)
    found = ["gcc", f"-print-file-name={LIBRARIES[kind]}"]
    library = subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": library, "PYTHONPATH": str(lib), **OPTIONS}
    pytest = str(Path(sys.executable).with_name("pytest"))
    # ThreadSanitizer of gcc 12 knows fewer address layouts than Linux draws from.
    fixed = ["setarch", "-R"] if kind == "thread" else []
    # pytest must not swallow what a sanitizer writes to the file descriptor before it ends the process.
    command = [*fixed, pytest, "-p", "no:cacheprovider", "--capture=sys", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    arguments = sys.argv[1:]
    kind = "thread" if "--thread" in arguments else "address"
    tests = [argument for argument in arguments if argument != "--thread"]
    sys.exit(run(kind, tests or ["tests/test_native_memory.py"]))
