"""The CUDA C++ kernels compile for GPUs that are not here: a sample is compiled, and `make audit` has compiled all as they are."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_audit
import pytest
from cuda_probe import forget, probe, probe_sources  # noqa: F401

from fastattn.runtime import audit, cache, env, jit

if jit.error() is not None:
    pytest.skip(jit.error() or "", allow_module_level=True)
pytest.importorskip("triton")  # its wheel has cuobjdump


def _sample() -> list[tuple[str, int]]:
    """Every room for sm_80 and sm_90a, and for one of the newer ones."""
    newer = {room: cuda_audit.ARCHS[2 + i % 2] for i, room in enumerate(cuda_audit.ROOMS)}
    return [(room, arch) for room in cuda_audit.ROOMS for arch in (80, 90, newer[room])]


@pytest.mark.slow
@pytest.mark.parametrize("room, arch", _sample())
def test_kernels_fit_without_spilling(room, arch):
    kernels = cuda_audit.distinct(room, arch, everything=False)
    if not kernels:
        pytest.skip(f"{room} has no kernels for sm_{arch}")
    kernel = kernels[cuda_audit.ARCHS.index(arch) % len(kernels)]  # another one for each architecture
    built, faults = cuda_audit.faults(cuda_audit.Case(room, kernel, arch))
    print(built)
    assert not faults, f"{built}: {'; '.join(faults)}"


@pytest.mark.slow
@pytest.mark.parametrize("room", cuda_audit.ROOMS)
def test_every_specialisation_is_the_one_that_was_audited(room):
    """Without compiling: what a call may launch, and the code of it, are those of the last whole audit, which found no fault."""
    record = json.loads(cuda_audit.RECORD.read_text())
    if record["compiler"] != cuda_audit.compiler():
        pytest.skip(f"audited with {record['compiler']}, here is {cuda_audit.compiler()}")
    for arch in cuda_audit.ARCHS:
        kernels, kept = cuda_audit.distinct(room, arch, everything=True), record["audited"].get(f"{room} sm_{arch}")
        if not kernels:
            assert kept is None
            continue
        assert kept, f"{room} on sm_{arch} was never audited as a whole: run make audit, and commit tests/audited.json"
        print(
            f"{room} sm_{arch}: {kept['kernels']} kernels, slowest {kept['slowest']} s of {audit.SECONDS:.0f} allowed"
        )
        assert kept["kernels"] == len(kernels) and kept["identity"] == cuda_audit.identity(kernels), (
            f"{room} on sm_{arch} has changed since it was audited: run make audit, and commit tests/audited.json"
        )


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels compiled since an empty cache."""
    monkeypatch.setattr(env, "CUDA_CACHE", str(tmp_path / "cache"))
    cache.folder.cache_clear()
    made: list[str] = []
    real = jit.compile

    def counting(kernel: Any, target: str) -> jit.Compiled:
        made.append(f"{kernel} {target}")
        return real(kernel, target)

    monkeypatch.setattr(jit, "compile", counting)
    yield made
    cache.folder.cache_clear()


def test_a_kernel_is_audited_again_only_when_its_code_changes(probe_sources: Path, compilations):  # noqa: F811
    assert not audit.is_kept(probe(), "sm_80")
    first = audit.audit(probe(), "sm_80")
    assert audit.is_kept(probe(), "sm_80") and audit.audit(probe(), "sm_80") == first and len(compilations) == 1
    larger = audit.audit(probe(shared=4096), "sm_80")  # the same code, launched otherwise
    assert larger.shared == first.shared + 4096 and len(compilations) == 1
    assert audit.audit(probe(), "sm_80", fresh=True).opcodes == first.opcodes and len(compilations) == 2
    header = probe_sources / "probe_more.cuh"
    header.write_text(header.read_text().replace("x + T(by)", "x * x + T(by)"))
    forget()
    assert audit.audit(probe(), "sm_80").opcodes != first.opcodes and len(compilations) == 3


def test_what_takes_too_long_is_compiled_twice_before_it_is_blamed(probe_sources: Path, compilations, monkeypatch):  # noqa: F811
    monkeypatch.setattr(audit, "SECONDS", 0.0)
    monkeypatch.setattr(cuda_audit, "room_of", lambda name: None)  # which expects no instructions
    built, faults = cuda_audit.faults(cuda_audit.Case("", probe(), 80, hurried=True))
    assert len(compilations) == 2 and built is not None
    assert any("s to compile, 0 s are allowed" in fault for fault in faults)


SPILLING = """#include <probe_params.h>
template <class T, int kLive>
__global__ void __launch_bounds__(1024) probe_kernel(const __grid_constant__ ProbeParams p) {
  T value[kLive];
  for (int i = 0; i < kLive; ++i) value[i] = p.a[threadIdx.x * kLive + i];
  for (int turn = 0; turn < p.rows; ++turn)
#pragma unroll
    for (int i = 0; i < kLive; ++i) value[i] = value[i] * value[(i * 7 + 3) % kLive] + p.scale;
  for (int i = 0; i < kLive; ++i) const_cast<T*>(p.b)[threadIdx.x * kLive + i] = value[i];
}
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_a_kernel_that_spills_is_found(probe_sources: Path, target):  # noqa: F811
    (probe_sources / "probe.cuh").write_text(SPILLING)
    spilling, fitting = audit.audit(probe("float", "72"), target), audit.audit(probe("float", "8"), target)
    assert spilling.registers == 64 and spilling.count("STL") and any("it spills" in f for f in spilling.faults())
    assert fitting.faults(["FFMA", "STG"]) == [] and fitting.registers < 64


BARRIERS = """#include <probe_params.h>
template <class T, int kUsed>
__global__ void __launch_bounds__(64) probe_kernel(const __grid_constant__ ProbeParams p) {
  __shared__ T kept[256];
  kept[threadIdx.x] = p.a[threadIdx.x];
  asm volatile("bar.sync %0, 64;" ::"n"(kUsed - 1) : "memory");
  const_cast<T*>(p.b)[threadIdx.x] = kept[p.rows];
}
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_shared_memory_and_barriers_are_counted(probe_sources: Path, target):  # noqa: F811
    (probe_sources / "probe.cuh").write_text(BARRIERS)
    built = audit.audit(probe("float", "5", shared=2048), target)
    assert built.shared == 1024 + 2048 and built.barriers == 5 and built.count("BAR")


ROLES = """#include <probe_params.h>
template <class T, int kRaised>
__global__ void __launch_bounds__(512, 1) probe_kernel(const __grid_constant__ ProbeParams p) {
  T* out = const_cast<T*>(p.b) + threadIdx.x;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    for (int turn = 0; turn < p.rows; ++turn) *out += p.a[turn];
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRaised));
    T value[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) value[i] = p.a[threadIdx.x * 64 + i];
    for (int turn = 0; turn < p.rows; ++turn)
#pragma unroll
      for (int i = 0; i < 64; ++i) value[i] = value[i] * value[(i * 7 + 3) % 64] + p.scale;
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i] = value[i];
  }
}
"""


def test_the_registers_of_roles_are_read_and_must_be_there(probe_sources: Path):  # noqa: F811
    (probe_sources / "probe.cuh").write_text(ROLES)
    kernels = (dataclasses.replace(probe("float", count), threads=512) for count in ("160", "168"))
    fitting, greedy = (audit.audit(kernel, "sm_90a") for kernel in kernels)
    lowered, raised = sorted(fitting.roles)
    assert lowered.budget == 24 and lowered.used <= 24 and raised.budget == 160 and 64 < raised.used <= 160
    assert fitting.registers == 128 and fitting.faults() == []
    assert greedy.faults() == ["its warpgroups ask for 67584 registers, the block has 65536"]


def _made(target: str = "sm_80", **facts: Any) -> audit.Audited:
    opcodes = collections.Counter({"HMMA.16816.F32": 3, "HMMA.1688.F32": 1, "LDSM.16.M88.4": 2})
    numbers = {"threads": 128, "registers": 128, "stack": 0, "shared": 0, "barriers": 1} | facts
    return audit.Audited("k", target, **numbers, opcodes=opcodes, seconds=0.1)


def test_opcodes_are_counted_by_whole_parts_of_their_names():
    assert _made().count("HMMA") == 4 and _made().count("HMMA.16816") == 3 and _made().count("HMMA.168") == 0
    assert _made().faults(["LDSM", "HGMMA"]) == ["no HGMMA in it"]


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"shared": 164 << 10}, "167936 bytes of shared memory, 166912 fit"),
        ({"shared": 100 << 10, "target": "sm_86"}, "102400 bytes of shared memory, 101376 fit"),
        ({"threads": 384, "registers": 176}, "384 threads of 176 registers"),
        ({"stack": 8}, "it spills"),
        ({"barriers": 17}, "17 barriers"),
        ({"roles": (audit.Role(False, 24, 26),)}, "a role of 24 registers uses 26"),
        ({"log": "wgmma is\n serialized"}, "the compiler says: wgmma is serialized"),
    ],
)
def test_what_does_not_fit_is_a_fault(facts, words):
    (fault,) = _made(**facts).faults()
    assert words in fault
    assert _made("sm_90a", threads=384, registers=168, shared=227 << 10, barriers=16).faults() == []
