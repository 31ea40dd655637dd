"""Where a CUDA kernel runs: on a GPU, in an emulator, in a recording, or nowhere with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_probe import probe, probe_sources  # noqa: F401

from fastattn.runtime import cuda, gpu, jit, native

EMULATOR = cuda.emulator  # what conftest.py has put in place
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch):
    monkeypatch.setattr(cuda, "emulator", None)
    cuda.missing.cache_clear()
    yield
    cuda.missing.cache_clear()


@pytest.fixture
def healthy(monkeypatch):
    """A machine that has everything."""
    monkeypatch.setattr(gpu, "objections", list)
    monkeypatch.setattr(jit, "error", lambda: None)
    monkeypatch.setattr(native, "error", lambda: None)
    monkeypatch.setattr(native, "module", lambda: type("Native", (), {"driver_error": staticmethod(lambda: None)}))


def test_a_machine_with_everything_has_no_objections(healthy):
    assert cuda.objections("cuda") == []
    assert cuda.objections("cpu") == ["device cuda, got cpu"]
    assert cuda.objections("xpu") == ["device cuda, got xpu"]


def test_each_thing_that_is_missing_is_named(healthy, monkeypatch):
    monkeypatch.setattr(gpu, "objections", lambda: ["a GPU, and torch finds none"])
    monkeypatch.setattr(jit, "error", lambda: "NVRTC, which was not found")
    driverless = type("Native", (), {"driver_error": staticmethod(lambda: "the CUDA driver: libcuda.so.1")})
    monkeypatch.setattr(native, "module", lambda: driverless)
    assert cuda.objections("cuda") == [
        "a GPU, and torch finds none",
        "the CUDA driver: libcuda.so.1",
        "NVRTC, which was not found",
    ]
    monkeypatch.setattr(native, "error", lambda: "it is not built")
    cuda.missing.cache_clear()
    assert cuda.objections("cuda")[1] == "the launcher in the native module: it is not built"


@pytest.mark.skipif(native.error() is not None or torch.cuda.is_available(), reason="needs the module and no driver")
def test_without_a_driver_the_module_says_what_it_looked_for():
    assert "libcuda.so.1" in (native.module().driver_error() or "")


@pytest.mark.parametrize("capability, objection", [((7, 5), "8.0 or newer, got 7.5"), ((8, 0), None), ((12, 1), None)])
def test_the_oldest_gpu_decides(monkeypatch, capability, objection):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0) if i else capability)
    for cached in (gpu.lowest_arch, gpu.arch_of):
        cached.cache_clear()
    try:
        assert [objection in o for o in gpu.objections()] == ([True] if objection else [])
        assert cuda.arch(torch.device("cuda", 0)) == 10 * capability[0] + capability[1]
        assert cuda.arch(torch.device("cuda", 1)) == 90
    finally:
        for cached in (gpu.lowest_arch, gpu.arch_of):
            cached.cache_clear()


def test_an_emulator_takes_cpu_tensors_and_nothing_else(probe_sources, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(cuda, "emulator", seen.append)
    assert cuda.objections("cpu") == [] and cuda.arch(CPU) == cuda.EMULATED_ARCH and cuda.sms(CPU) == cuda.EMULATED_SMS
    kernel, x = probe(), torch.empty(3)
    cuda.run(kernel, (2, 1, 1), [x, 1], CPU)
    cuda.run(kernel, (2, 0, 1), [x, 1], CPU)
    assert [(launch.kernel, launch.grid, launch.values) for launch in seen] == [(kernel, (2, 1, 1), (x, 1))]


def test_a_recording_pretends_to_be_the_gpu_that_it_names(probe_sources, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(cuda, "emulator", seen.append)
    with cuda.recording(100, sms=148) as outer:
        assert cuda.objections("cpu") == [] and cuda.arch(CPU) == 100 and cuda.sms(CPU) == 148
        with cuda.recording(80) as inner:
            assert cuda.arch(CPU) == 80
            cuda.run(probe(), (1, 1, 1), [1], CPU)
        cuda.run(probe(), (1, 1, 1), [2], CPU)
    assert [launch.values for launch in inner.launches] == [(1,)]
    assert [launch.values for launch in outer.launches] == [(2,)] and not seen


def test_without_either_a_cpu_tensor_is_refused(probe_sources):  # noqa: F811
    with pytest.raises(RuntimeError, match="probe_kernel<float, 1> runs on a GPU, got tensors on cpu"):
        cuda.run(probe(), (1, 1, 1), [1], CPU)


def _values(x: torch.Tensor, a: torch.Tensor) -> list[Any]:
    mapped = cuda.TensorMap(torch.empty(16, 8, device=x.device), (8, 16), (8,), (8, 4))
    return [x, 3, 1, 2, 3, 0.5, 1, 2, 3, mapped, a, None, 4]


def test_a_kernel_computes_where_its_tensors_are(probe_sources, monkeypatch):  # noqa: F811
    """The same specialisation on a GPU through NVRTC and the launcher, elsewhere in the emulator."""
    if EMULATOR is None and not torch.cuda.is_available():
        pytest.skip("neither a GPU nor a compiler for the emulator")
    monkeypatch.setattr(cuda, "emulator", EMULATOR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
    x, a = torch.zeros(64, device=device), torch.arange(64.0, device=device)
    cuda.run(probe("float", "5"), (1, 1, 1), _values(x, a), x.device)
    assert torch.equal(x, a + 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_launch_follows_the_stream_and_is_captured(probe_sources):  # noqa: F811
    kernel, x, a = probe("float", "7"), torch.zeros(64, device="cuda"), torch.arange(64.0, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):  # loads the kernel, too
        cuda.run(kernel, (1, 1, 1), _values(x, a), x.device)
    torch.cuda.synchronize()
    assert not x.any()
    a.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(x, a + 7)


def test_a_specialisation_is_one_object(probe_sources):  # noqa: F811
    assert probe() is probe() and probe() is not probe(shared=64)
    assert str(probe("bf16", "3")) == "probe_kernel<bf16, 3>"
