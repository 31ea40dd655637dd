"""The launcher of Triton kernels: what it takes for the same specialisation, and what a launch costs the host."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import host_cost
import pytest
import torch
from launch_calls import WITHOUT_BACKWARD, backward_of, calls

import fastattn
from fastattn.runtime import gpu, launch


class Driver:
    """Stands in for Triton and CUDA: counts the launches that arrive."""

    def __init__(self) -> None:
        self.first = self.later = 0
        self.seen: tuple[Any, ...] = ()

    def compile(self, *_: Any) -> tuple[Any, tuple[Any, ...], Any]:
        self.first += 1
        return self.launch, ("function", "metadata"), "compiled"

    def launch(self, *args: Any) -> None:
        self.later += 1
        self.seen = args


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """CPU tensors are taken for those of the current GPU, and nothing runs."""
    driver = Driver()
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "objections", lambda device: [])
    monkeypatch.setattr(launch, "_first", driver.compile)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_exact", {})
    monkeypatch.setattr(gpu, "current_device", lambda: -1)  # what a CPU tensor answers
    monkeypatch.setattr(gpu, "stream_of", lambda device: 7)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)  # poisoning would count as host time
    yield driver


def _run(*args: Any, **constants: Any) -> None:
    """Tensors first, then numbers and None."""
    tensors = tuple(a for a in args if isinstance(a, torch.Tensor))
    launch.run("kernel", (3, 2), tensors, args[len(tensors) :], constants)


def test_equal_specialisations_compile_once(driver):
    x = torch.zeros(64)
    _run(x, 32, 5, 0.5, None, BLOCK=16)
    assert (driver.first, driver.later) == (1, 0)
    _run(x, 48, 6, 0.25, None, BLOCK=16)  # multiples of 16 and other integers are alike
    assert (driver.first, driver.later) == (1, 1)
    assert driver.seen[:6] == (3, 2, 1, 7, "function", "metadata")
    assert driver.seen[6:] == (x.data_ptr(), 48, 6, 0.25, None, 16)
    _run(x, 48, 6, 0.25, None, BLOCK=16)
    assert (driver.first, driver.later) == (1, 2)


@pytest.mark.parametrize(
    "other",
    [
        ("dtype", torch.zeros(64, dtype=torch.float16), 32),
        ("alignment", torch.zeros(65)[1:], 32),
        ("one", None, 1),
        ("not a multiple of 16", None, 33),
        ("wide", None, 1 << 32),
        ("absent", None, None),
    ],
    ids=lambda other: other[0],
)
def test_other_specialisations_compile_anew(driver, other):
    x = torch.zeros(64)
    _run(x, 32, BLOCK=16)
    _run(x if other[1] is None else other[1], other[2], BLOCK=16)
    assert driver.first == 2


def test_constants_and_warps_compile_anew(driver):
    x = torch.zeros(64)
    _run(x, BLOCK=16)
    _run(x, BLOCK=32)
    launch.run("kernel", (1,), (x,), (), {"BLOCK": 16}, num_warps=8)
    launch.run("another", (1,), (x,), (), {"BLOCK": 16})
    assert driver.first == 4


def test_numbers_that_never_repeat_do_not_pile_up(driver, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_EXACT", 8)
    x = torch.zeros(64)
    for n in range(100, 200):
        _run(x, 16 * n, BLOCK=16)
    assert (driver.first, driver.later) == (1, 99)
    assert len(launch._exact) <= 8


def test_nothing_to_do_is_not_launched(driver):
    launch.run("kernel", (0, 4), (torch.zeros(1),), (), {})
    assert driver.first == 0


def test_recording_collects_and_runs_nothing(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with launch.recording(90, sms=132) as recorded:
        assert launch.arch(torch.device("cpu")) == 90 and launch.sms(torch.device("cpu")) == 132
        assert not launch.objections("cpu")
        _run(torch.zeros(4), 3, BLOCK=8)
    assert [(r.kernel, r.grid, r.constants) for r in recorded.launches] == [("kernel", (3, 2), {"BLOCK": 8})]


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_heads_too_wide_for_a_small_gpu_are_refused_by_name(monkeypatch, arch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    q = torch.zeros(1, 4, 2, 512)
    cache, lengths = torch.zeros(1, 8, 2, 512), torch.zeros(1, dtype=torch.int32)
    with launch.recording(arch), fastattn.use_backend("triton"):
        for found in (
            fastattn.explain(fastattn.attention, q, q, q),
            fastattn.explain(fastattn.attention_kvcache, q, cache, cache, lengths),
        ):
            if arch in (86, 89, 120):
                assert "shared memory" in str(found.objections["triton"]), found
            else:
                assert found.chosen == "triton" and found.tuning, found


def test_more_heads_and_sequences_than_a_grid_has_rows(monkeypatch):
    """CUDA takes 2^31 blocks in a grid's first axis and 65535 in the others."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    q = torch.zeros(1100, 1, 64, 16, requires_grad=True)
    bias = torch.zeros(64, 1, 1, requires_grad=True)
    x = torch.zeros(70000, 16, requires_grad=True)
    with launch.recording(90) as recorded, fastattn.use_backend("triton"):
        o = fastattn.attention(q, q, q, bias=bias)
        torch.autograd.grad(o, (q, bias), o)
        torch.autograd.grad(fastattn.rms_norm(x), x, x)
        fastattn.rope(q, torch.ones(1, 8), torch.zeros(1, 8))
        new, lengths = q.detach(), torch.zeros(1100, dtype=torch.int32)
        fastattn.attention_kvcache(new, new.clone(), new.clone(), lengths, k=new, v=new, num_splits=2)
    grids = [made.grid for made in recorded.launches]
    assert len(grids) >= 10 and max(grid[0] for grid in grids) > 65535
    assert all(axis <= 65535 for grid in grids for axis in grid[1:])


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(fastattn.UnsupportedError, match="device cuda, got cpu"), fastattn.use_backend("triton"):
        fastattn.rms_norm(torch.zeros(2, 8))


def _costs_at_most(capsys: pytest.CaptureFixture[str], name: str, call: Callable[[], Any], most: float) -> None:
    with fastattn.use_backend("triton"):
        call()
        cost = host_cost.cost(call, most)
    with capsys.disabled():
        print(f"\n{name}: {cost:.1f} µs", end="")
    assert cost <= most


@pytest.mark.parametrize("name", calls())
def test_host_cost(driver, name, capsys):
    """At most 25 µs from the public call to the launch on a warm cache."""
    _costs_at_most(capsys, name, calls()[name], 25)
    assert driver.later > 0


@pytest.mark.parametrize("name", [name for name in calls() if name not in WITHOUT_BACKWARD])
def test_host_cost_with_gradients(driver, name, capsys):
    """At most 40 µs from the public call to the launch, and 75 from `autograd.grad` to the last launch of the backward."""
    call = calls(grad=True)[name]
    _costs_at_most(capsys, f"{name} with gradients", call, 40)
    with fastattn.use_backend("triton"):
        backward = backward_of(call())
    launched = driver.later
    _costs_at_most(capsys, f"{name} backward", backward, 75)
    assert driver.later > launched


@pytest.mark.parametrize("version", ["3.2.0", "3.10.1+git1"])
def test_a_triton_older_than_the_kernels_is_refused_by_name(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"triton": version}.__getitem__)
    launch._version.cache_clear()
    try:
        found = [text for text in launch.objections("cuda") if "newer" in text]
    finally:
        launch._version.cache_clear()
    assert found == (["triton 3.6 or newer, got 3.2.0"] if version == "3.2.0" else [])
