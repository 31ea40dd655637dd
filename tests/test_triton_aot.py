"""The Triton kernels compile for GPUs that are not here: a sample of tests/triton_aot.py (`make aot` compiles all)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may have chosen the interpreter, whose kernels cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=HERE.parent
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("room", ["norm_rope", "attention", "decode"])
def test_kernels_fit_without_spilling(room, arch):
    if not (HERE / f"aot_{room}.py").exists():
        pytest.skip(f"no launches of {room}")
    done = _run(str(HERE / "triton_aot.py"), "--arch", arch, "--room", room, "--quiet", "--at-most", "14")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout.split()[-6]) >= 7, done.stdout


def test_a_kernel_that_spills_is_found():
    code = (
        "from fastattn.runtime.aot import Compiled; import json;"
        "print(json.dumps([Compiled('k', 90, 8, 255, 64, 0, '').faults(),"
        "Compiled('k', 80, 4, 32, 0, 200 << 10, '').faults(), Compiled('k', 90, 4, 32, 8, 100, '').faults()]))"
    )
    spills, large, fine = json.loads(_run("-c", code).stdout)
    assert "spills" in spills[0] and "shared memory" in large[0] and fine == []


@pytest.mark.slow
def test_tuning_compiles_its_candidates():
    code = (
        "from fastattn.benchmarks.gpu import tune; import json;"
        "found = [tune.compiles(tune.Candidate(64, kind, phase, tile), 90) for kind, phase, tile in ("
        "('dense', 'fwd', tune.tuning.Tile(128, 64, 4, 2)), ('pairs', 'dkdv', tune.tuning.Tile(64, 64, 4, 2)),"
        "('dense', 'fwd', tune.tuning.Tile(128, 128, 4, 4)))];"
        "found += [tune.compiles(c, 90) for c in tune.persistent("
        "tune.Candidate(64, 'dense', 'dkdv', tune.tuning.Tile(64, 128, 8, 2)))];"
        "print(json.dumps(found))"
    )
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert all(0 < facts["registers"] <= 255 and facts["shared"] > 0 for facts in found if "registers" in facts)
    assert "refused" not in found[0] and all("refused" not in resident for resident in found[3:]), found
