"""The Triton kernels compile for GPUs that are not here: a sample of tests/triton_aot.py (`make aot` compiles all)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastattn.runtime.aot import Compiled, spent_on_stack

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
    compiled = Compiled("k", arch=80, num_warps=8, registers=255, stack=144, shared=0, ptx="", looped=0.009)
    assert compiled.faults() == []
    for change in ({"looped": 0.011}, {"stack": 168, "looped": 0.0}):
        assert "spills" in replace(compiled, **change).faults()[0], change
    assert replace(compiled, stack=16, looped=1.0).faults() == []
    assert "registers" in replace(compiled, num_warps=16, registers=129).faults()[0]
    assert "shared memory" in replace(compiled, shared=200 << 10).faults()[0]
    assert replace(compiled, arch=90, shared=200 << 10).faults() == []


def test_a_kernel_without_its_tensor_instruction_is_found():
    """Both on sm_90: 64 rows of queries want warp groups; 32 do without, and float32 has no such products."""
    code = (
        "import json, torch, triton_aot, aot_attention; from fastattn.ops.attention import tuning; usual = tuning.row;"
        "from fastattn.runtime.aot import Compiled; found = [];"
        "none, fine = (Compiled('k', 90, 8, 255, 0, 0, ptx) for ptx in ('fma.rn.f32', 'wgmma.mma_async.sync.aligned'))\n"
        "for rows, dtype in ((64, torch.float16), (32, torch.float16), (64, torch.float32)):\n"
        "    tuning.row = lambda *call: usual(*call)._replace(fwd=tuning.Tile(rows, 64, 4, 2))\n"
        "    launch = next(aot_attention._calls(90, dtype, 64, 64, 4096, {}))\n"
        "    found.append([triton_aot.faults(built, launch, 90) for built in (none, fine)])\n"
        "print(json.dumps(found))"
    )
    done = _run("-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); exec({code!r})")
    assert done.returncode == 0, done.stderr[-2000:]
    large, small, plain = json.loads(done.stdout)
    assert large == [["no wgmma.mma_async in it"], []] and small[0] == ["no mma.sync in it"] and plain == [[], []]


def test_what_loops_spend_on_the_stack():
    """Stores outside of loops, a load in an outer loop of 5 instructions, and one in its inner loop of 3."""
    code = """
        /*0000*/                   STL [R1], R4 ;                        /* 0x0000000401007387 */
        /*0010*/                   LDL.64 R2, [R1+0x8] ;                 /* 0x0000080001027983 */
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;       /* 0x000000060408723c */
        /*0030*/              @!P0 LDL R2, [R1] ;                        /* 0x0000080001027983 */
        /*0040*/              @!P0 BRA 0x20 ;                            /* 0xfffffff000007947 */
        /*0050*/               @P1 BRA 0x10 ;                            /* 0xffffffd000007947 */
        /*0060*/                   STL.64 [R1+0x8], R4 ;                 /* 0x0000000401007387 */
        /*0070*/                   BRA 0x70 ;                            /* 0xfffffff000007947 */
        /*0080*/               @P1 BRA 0x90 ;                            /* 0xfffffff000007947 */
    """
    assert spent_on_stack(code) == 1 / 3
    assert spent_on_stack(code.replace("@!P0 LDL R2, [R1] ", "MOV R2, R1 ")) == 1 / 5
    assert spent_on_stack("") == 0


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
