"""The host's part of attention on the CUDA kernels: what it leaves to them, and on which GPU it decides for which kernel."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from attention_calls import DEVICE, Calls
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.ops.attention import _cuda, attention, attention_kvcache
from fastattn.runtime import cuda

if cuda.objections(DEVICE):
    pytest.skip(f"the backend cuda needs {'; '.join(cuda.objections(DEVICE))}", allow_module_level=True)
CALLS = Calls(70, 150, headdim=64, dtype=torch.bfloat16, tile=32, window=(11, 6))
ROADS = ["any GPU", "Hopper"]


@pytest.fixture
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cuda, "_portable", request.param == "any GPU")
    return request.param


@pytest.mark.parametrize("road", ROADS, indirect=True)
@pytest.mark.parametrize("seqlen_q", [70, 0])
def test_launches_done_again_give_the_same(road: str, seqlen_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph does: what must be zero at first is made so by a kernel, not by the host."""
    launches: list[tuple[Any, ...]] = []
    usual = cuda.run
    monkeypatch.setattr(cuda, "run", lambda *launch: launches.append(launch) or usual(*launch))
    tensors = {name: t.requires_grad_() for name, t in CALLS.qkv(seqlen_q).items()}
    o = attention(**tensors, causal="upper_left", backend="cuda")
    gradients = torch.autograd.grad(o, list(tensors.values()), torch.ones_like(o))
    first = [t.clone() for t in (o, *gradients)]
    for t in (o, *gradients):
        t.detach().fill_(float("nan"))
    for launch in launches:
        usual(*launch)
    assert len(launches) == 4
    for again, before in zip((o, *gradients), first, strict=True):
        assert torch.equal(again, before) and before.isfinite().all()


@pytest.mark.parametrize("road", ROADS, indirect=True)
def test_a_grid_holds_more_heads_than_its_smaller_dimensions(road: str) -> None:
    """Which have at most 65535 blocks."""
    q, k, v = (torch.empty(33_000, seqlen, 2, 8, dtype=torch.bfloat16) for seqlen in (1, 3, 3))
    lengths = torch.zeros(33_000, dtype=torch.int32)
    with cuda.recording(90) as recorded:
        attention(q, k, v, backend="cuda")
        attention_kvcache(q, k, v, lengths, k=k[:, :1], v=v[:, :1], backend="cuda")
    names = [launch.kernel.name for launch in recorded.launches]
    assert names[1:] == ["attention_append_kernel", "attention_decode_kernel"]
    for launch in recorded.launches:
        x, y, z = launch.grid
        assert x < 1 << 31 and y < 1 << 16 and z < 1 << 16, (launch.kernel.name, launch.grid)
    if names[0] == "attention_fwd_kernel":
        assert math.prod(recorded.launches[0].grid) >= 66_000


class Counted(TorchDispatchMode):
    """What is asked of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("road", ROADS, indirect=True)
def test_a_backward_asks_torch_for_one_allocation_and_no_fill(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, usual = Counted(), _cuda.backward

    def backward(*args: Any) -> None:
        with counted:
            usual(*args)

    monkeypatch.undo()  # torch.empty is not to be filled with NaN
    monkeypatch.setattr(cuda, "_portable", road == "any GPU")
    monkeypatch.setattr(cuda, "run", lambda *_: None)
    monkeypatch.setattr(_cuda, "backward", backward)
    tensors = [t.requires_grad_() for t in CALLS.qkv().values()]
    attention(*tensors, backend="cuda").sum().backward()
    assert counted.found.pop("new_empty") == 1
    assert set(counted.found) <= {"split_with_sizes", "slice"}


def test_the_gpu_of_the_tensors_decides_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper beside a current device of compute capability 8.0."""
    launched: list[str] = []
    monkeypatch.setattr(cuda, "run", lambda kernel, *_: launched.append(kernel.name))
    monkeypatch.setattr(cuda, "hopper", lambda device: True)
    monkeypatch.setattr(cuda, "arch", lambda device: 80)
    tensors = [t.requires_grad_() for t in CALLS.qkv().values()]
    attention(*tensors, backend="cuda").sum().backward()
    assert {"attention_fwd_sm90_kernel", "attention_bwd_sm90_kernel"} <= set(launched)
