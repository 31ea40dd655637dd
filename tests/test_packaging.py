"""The wheel: built in isolation without torch, imported in a clean environment, and alive without its native module."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

CALL = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import torch, fastattn
from fastattn.runtime import native, sources
assert any("slow reference" in str(w.message) for w in told) == (native.error() is not None)
q = torch.randn(1, 5, 2, 8)
o = fastattn.attention(q, q, q, causal=True)
assert torch.isfinite(o).all()
assert torch.isfinite(fastattn.rms_norm(q)).all()
assert str(sources.folder()).endswith("fastattn/_csrc/cuda") and "norm_fwd.cuh" in sources.closure("norm_fwd.cuh")
print(fastattn.__file__, native.error())
"""


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:  # what a fresh clone has, so that nothing built here can leak into the wheel
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source), cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A clean environment's interpreter. torch is lent from here: hundreds of megabytes that are not under test."""
    import torch

    _run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    (_site(tmp_path) / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parent.parent))
    return tmp_path / "venv" / "bin" / "python"


def _site(folder: Path) -> Path:
    return next((folder / "venv" / "lib").glob("python*/site-packages"))


def test_wheel_in_a_clean_environment(wheel: Path, python: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("fastattn/_native") for name in names), "the native module is missing"
    kernels = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/cuda").rglob("*.*h")}
    assert {f"fastattn/_{name}" for name in kernels} <= set(names), "the sources of the CUDA kernels are missing"
    assert "fastattn/py.typed" in names and "fastattn/benchmarks/run.py" in names
    _run(str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    printed = _run(str(python), "-c", CALL, cwd=tmp_path)
    assert str(_site(tmp_path)) in printed and printed.strip().endswith("None")


def test_without_the_native_module(wheel: Path, python: Path, tmp_path: Path) -> None:
    _run(str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    (native,) = (_site(tmp_path) / "fastattn").glob("_native*")
    native.unlink()
    printed = _run(str(python), "-c", CALL, cwd=tmp_path)
    assert str(_site(tmp_path)) in printed and "native module is not built" in printed


def test_the_ways_into_a_model_are_imported_when_first_used() -> None:
    code = (
        "import sys, fastattn; loaded = set(sys.modules); assert not any(m.startswith('transformers') for m in loaded);"
        "assert 'fastattn.nn' not in loaded and 'fastattn.ops.attention._triton' not in loaded;"
        "assert fastattn.nn.RMSNorm and fastattn.sdpa.enable and fastattn.ops.rope.tables.plain;"
        "print(hasattr(fastattn, 'nothing'))"
    )
    assert _run(sys.executable, "-c", code, cwd=ROOT).strip() == "False"
