"""What is special about the CUDA C++ kernels of layer_norm, rms_norm and rope: which kernel serves which rows, and that
every one of them keeps the law. On CPU tensors they run in the emulator, which also looks for races.

The rooms' own tests run them too.
"""

from __future__ import annotations

import functools
from typing import Any

import each
import law
import pytest
import torch

import fastattn
from fastattn.ops import _norm
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.layer_norm import reference as layer_norm_reference
from fastattn.ops.rms_norm import reference as rms_norm_reference
from fastattn.ops.rms_norm import rms_norm
from fastattn.ops.rope import rope, rope_qk, tables
from fastattn.runtime import cuda

pytestmark = pytest.mark.skipif(
    bool(cuda.objections("cpu")) and not torch.cuda.is_available(), reason="neither a GPU nor the emulator's compiler"
)
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def forced():
    with fastattn.use_backend("cuda"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the emulator passes for; a GPU stays what it is."""
    monkeypatch.setattr(cuda, "EMULATED_ARCH", request.param)
    return request.param


def tensors(rows: int, cols: int, dtype: torch.dtype, *, bias: bool = True, residual: bool = False) -> dict[str, Any]:
    found = {"x": law.randn(rows, cols, dtype=dtype, seed=1), "weight": law.randn(cols, dtype=dtype, seed=2)}
    if bias:
        found["bias"] = law.randn(cols, dtype=dtype, seed=3)
    if residual:
        found["residual"] = law.randn(rows, cols, dtype=dtype, seed=4)
    return found


def layer_norm_holds(given: dict[str, torch.Tensor]) -> None:
    law.check(layer_norm, layer_norm_reference.layer_norm, given, wants=tuple(given), names=("y", "sum"))


def rms_norm_holds(given: dict[str, torch.Tensor]) -> None:
    law.check(rms_norm, rms_norm_reference.rms_norm, given, wants=tuple(given), names=("y", "sum"))


def kernels(arch: int, cols: int, dtype: torch.dtype, *, residual: bool = False) -> list[str]:
    """The kernels of a forward and a backward of 4 rows, with the blocks of a cluster, packs per thread, rows under way, and
    whether shared memory holds the row."""
    given = tensors(4, cols, dtype, residual=residual)
    leaves = {name: torch.empty_like(t, requires_grad=True) for name, t in given.items()}
    with cuda.recording(arch) as recorded:
        outputs = layer_norm(**leaves)
        outputs = outputs if residual else (outputs,)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(t) for t in outputs])
    found = []
    for launch in recorded.launches:
        kernel = launch.kernel
        name = kernel.name.removeprefix("norm_").removesuffix("_kernel")
        if name == "fwd_long" and kernel.constants[4] == "true":
            name = "fwd_staged"
        if name == "bwd":
            name += f" {'x'.join(kernel.constants[3:5])}"
        found.append(name + (f" of {kernel.cluster}" if kernel.cluster > 1 else ""))
    return found


# The last row of each class and the first one of the next: 32 packs (several rows per thread), 128 (64 backward, one warp),
# 2048 (1024 backward, one block); a pack is 8 columns of bfloat16.
@pytest.mark.parametrize("cols", [256, 264, 512, 520, 1024, 1032])
def test_rows_around_the_edges_of_the_classes(cols):
    layer_norm_holds(tensors(5, cols, BF16, residual=True))


REREAD = ["bwd_long", "bwd_columns", "reduce"]


def test_a_row_is_held_by_as_little_as_holds_it():
    for cols, forward, backward in (
        (768, "fwd", "bwd 3x2"),
        (8192, "fwd", "bwd 2x2"),
        (16384, "fwd", "bwd 4x2"),
        (16392, "fwd_staged", "bwd 4x2 of 2"),
        (32776, "fwd_staged", "bwd 4x2 of 4"),
        (57704, "fwd_staged of 2", "bwd 4x2 of 4"),
        (131072, "fwd_staged of 4", "bwd 4x2 of 8"),
    ):
        assert kernels(90, cols, BF16) == [forward, backward, "reduce"], cols
    assert kernels(90, 131072, BF16, residual=True) == ["fwd_staged of 8", "bwd 4x2 of 8", "reduce"]
    assert kernels(90, 131080, BF16) == ["fwd_staged of 4", *REREAD]
    assert kernels(120, 32768, BF16) == ["fwd_staged of 2", "bwd 2x2 of 4", "reduce"]  # with less shared memory
    assert kernels(120, 65544, BF16)[1:] == REREAD
    assert kernels(90, 928512, BF16)[0] == "fwd_staged of 8" and kernels(90, 928520, BF16)[0] == "fwd_long"


def test_without_clusters_a_block_must_hold_the_row():
    assert kernels(80, 8192, BF16) == ["fwd", "bwd 2x2", "reduce"]
    assert kernels(80, 16384, BF16) == ["fwd", "bwd 4x2", "reduce"]
    assert kernels(80, 16384, BF16, residual=True) == ["fwd", "bwd 4x1", "reduce"]
    assert kernels(80, 16392, BF16) == ["fwd_staged", *REREAD]
    assert kernels(80, 83296, BF16)[0] == "fwd_staged" and kernels(80, 83304, BF16)[0] == "fwd_long"
    assert kernels(89, 50528, BF16)[0] == "fwd_staged" and kernels(89, 50536, BF16)[0] == "fwd_long"
    assert kernels(90, 4097, F32) == ["fwd_staged", *REREAD]  # element by element


@pytest.mark.parametrize(
    ("arch", "cols"),
    [
        pytest.param(80, 6148, id="many columns per thread"),
        pytest.param(80, 8200, id="forward in shared memory, backward read twice"),
        pytest.param(80, 41652, id="read twice"),
        pytest.param(120, 8200, id="in clusters"),
        pytest.param(90, 16392, id="in clusters, many columns per thread"),
        pytest.param(90, 4101, id="element by element, forward in shared memory"),
    ],
    indirect=["arch"],
)
def test_long_rows(arch, cols, monkeypatch):
    """More rows than are under way at once, on one multiprocessor."""
    monkeypatch.setattr(cuda, "EMULATED_SMS", 1)
    layer_norm_holds(tensors(4, cols, F32, residual=cols < 41652))
    if cols == 8200:
        rms_norm_holds(tensors(2, cols, F32, bias=False))


@pytest.mark.parametrize(("rows", "cols"), [(1100, 24), (70, 776), (210, 768)])
def test_more_rows_than_run_at_once(rows, cols):
    """Lanes, pairs of warps, and a warp that share a row, several of them in a block."""
    layer_norm_holds(tensors(rows, cols, BF16, residual=True))


def test_tiny_rows_without_eps():
    x = law.randn(3, 64) * 1e-18
    for centred in (True, False):
        leaf = x.clone().requires_grad_()
        y = layer_norm(leaf, eps=0.0) if centred else rms_norm(leaf, eps=0.0)
        (dx,) = torch.autograd.grad(y, leaf, law.randn(3, 64, seed=5))
        double = x.double().requires_grad_()
        module = layer_norm_reference.layer_norm if centred else rms_norm_reference.rms_norm
        expected = module(double, eps=0.0)
        (truth,) = torch.autograd.grad(expected, double, law.randn(3, 64, seed=5).double())
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(dx.double(), truth, atol=1e-5 * float(truth.abs().max()), rtol=0)


@pytest.mark.parametrize("which", ["x", "weight", "residual", "dy"])
def test_a_misaligned_tensor_is_read_element_by_element(which):
    given = tensors(4, 64, BF16, residual=True)
    if which in given:
        flat = torch.empty(given[which].numel() + 1, dtype=BF16)[1:]
        given[which] = flat.view_as(given[which]).copy_(given[which])
        assert given[which].data_ptr() % 16
        layer_norm_holds(given)
        return
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    y, total = layer_norm(**leaves)
    aligned, odd = law.randn(4, 64, dtype=BF16), torch.empty(4 * 64 + 1, dtype=BF16)[1:].view(4, 64)
    odd.copy_(aligned)
    found = [
        torch.autograd.grad((y, total), list(leaves.values()), (dy, dy), retain_graph=True) for dy in (aligned, odd)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_that_begin_where_16_bytes_do_not():
    x = torch.randn(6, 67)[:, 3:]
    layer_norm_holds({**tensors(1, 64, F32), "x": x})
    layer_norm_holds({**tensors(1, 64, F32), "x": torch.randn(6, 68)[:, 4:]})


def test_the_same_bits_in_any_order_of_threads(monkeypatch):
    """No atomics: neither the order of blocks and warps nor the run shows in dweight."""
    given = {name: t.requires_grad_() for name, t in tensors(90, 136, F32, residual=True).items()}
    dy = law.randn(90, 136, seed=9)
    found = []
    for seed in (0, 1, 2):
        if cuda.emulator is not None:
            monkeypatch.setattr(cuda, "emulator", functools.partial(cuda.emulator, seed=seed))
        outputs = layer_norm(**given)
        found.append([each.bits(t) for t in (*outputs, *torch.autograd.grad(outputs, list(given.values()), (dy, dy)))])
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(found[0], run, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    given = tensors(70, 136, BF16)
    y = layer_norm(**given)
    for row in (0, 3, 69):
        assert torch.equal(layer_norm(**{**given, "x": given["x"][row]}), y[row])


def test_objections(monkeypatch):
    spec = _norm.NormSpec("rms_norm", (1 << 31, 1), BF16, None, "cpu", False)
    assert _norm.cuda_objections(spec)[-1] == "x has 2147483648 rows or columns, or more"
    assert _norm.cuda_objections(spec._replace(dtype=torch.float64, shape=(2, 8)))[-1].startswith("dtype float64")
    monkeypatch.setattr(cuda, "emulator", None)
    assert "device cuda, got cpu" in _norm.cuda_objections(spec._replace(shape=(2, 8)))


# ---- rope


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_gives_the_same_bits_by_16_bytes_and_by_elements(interleaved):
    for dtype in law.LOW:
        x = law.randn(2, 5, 3, 48, dtype=dtype)
        odd = torch.empty(x.numel() + 1, dtype=dtype)[1:].view_as(x).copy_(x)
        for table_dtype in {dtype, F32}:
            cos, sin = tables.plain(9, 32, dtype=table_dtype)
            assert torch.equal(rope(odd, cos, sin, interleaved=interleaved), rope(x, cos, sin, interleaved=interleaved))


@pytest.mark.parametrize(("nheads", "nheads_k", "headdim"), [(40, 8, 128), (3, 1, 64), (130, 1, 16)])
def test_rope_of_any_number_of_heads(nheads, nheads_k, headdim):
    """With many positions the threads are dealt out differently: 4 · 4 SMs is what counts as many here."""
    cos, sin = tables.plain(20, headdim)
    for seqlen in (3, 20):
        q, k = (law.randn(1, seqlen, n, headdim, dtype=BF16, seed=n) for n in (nheads, nheads_k))
        for turned, x in zip(rope_qk(q, k, cos, sin), (q, k), strict=True):
            law.compare("y", turned, *(fastattn.reference.rope(t, cos, sin) for t in (x, x.double())))


def test_rope_of_a_position_outside_of_the_tables_is_nan():
    cos, sin = tables.plain(8, 16)
    x = torch.randn(1, 4, 2, 20)
    for dtype in (torch.int32, torch.int64):
        y = rope(x, cos, sin, position_ids=torch.tensor([7, 8, -1, 0], dtype=dtype))
        assert y[:, 1:3, :, :16].isnan().all() and not y[:, [0, 3]].isnan().any()
        assert torch.equal(y[..., 16:], x[..., 16:])
