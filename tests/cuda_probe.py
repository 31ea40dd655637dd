"""A folder of CUDA C++ sources of the test's own in the place of csrc/cuda: one small kernel with a field of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattn.runtime import cuda, jit, params, sources

PARAMS = """#pragma once
#include <ptx/core.cuh>

struct ProbeParams {
  const void* x;      // [rows]
  int rows;
  i64 stride[3];
  float scale;
  u32 flags, more;    // two of a kind
  u64 seed;
  TensorMap map;
  const float *a, *b; // may be null
  int tail;
};
"""
KERNEL = """#pragma once
#include <probe_params.h>
#include <probe_more.cuh>

template <class T, int kAdd>
__global__ void __launch_bounds__(64) probe_kernel(const __grid_constant__ ProbeParams p) {
  if (p.a != nullptr) static_cast<T*>(const_cast<void*>(p.x))[threadIdx.x] = more(T(p.a[threadIdx.x]), kAdd);
}
"""
MORE = "template <class T>\nT more(T x, int by) { return x + T(by); }\n"


@pytest.fixture
def probe_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    place = tmp_path / "csrc"
    place.mkdir()
    (place / "ptx").symlink_to(sources.folder() / "ptx")
    (place / "probe_params.h").write_text(PARAMS)
    (place / "probe.cuh").write_text(KERNEL)
    (place / "probe_more.cuh").write_text(MORE)
    monkeypatch.setattr(sources, "_PLACES", (place,))
    forget()
    yield place
    monkeypatch.undo()
    forget()


def forget() -> None:
    """As in a new process."""
    for cached in (sources.folder, sources.read, sources.closure, jit.digest, params.layout, cuda.kernel, cuda.loaded):
        cached.cache_clear()


def probe(*constants: str, **facts: int) -> cuda.Kernel:
    layout = ("probe_params.h", "ProbeParams")
    return cuda.kernel("probe.cuh", "probe_kernel", constants or ("float", "1"), layout, 64, **facts)
