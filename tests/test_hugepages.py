"""The cache of huge pages behind our own large outputs: reuse, bound, switch, threads; results are ordinary tensors."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

import fastattn
from fastattn.ops import _alloc
from fastattn.runtime import native

if native.error() is not None:
    pytest.skip(str(native.error()), allow_module_level=True)
module = native.module()
if not module.has_exchange_api():
    pytest.skip("torch has no DLPack exchange API", allow_module_level=True)

MB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    gc.collect()
    bound, on = module.hugepage_bound(), module.hugepages()
    module.set_hugepages(True)
    module.release_hugepages()
    yield
    gc.collect()
    module.set_hugepage_bound(bound)
    module.set_hugepages(on)
    module.release_hugepages()


def large(megabytes: int = 40) -> torch.Tensor:
    return _alloc.empty((megabytes, MB // 4), torch.float32, CPU)


def test_a_block_is_kept_and_used_again():
    first = large()
    address = first.data_ptr()
    assert address % (2 * MB) == 0 and module.cached_hugepage_bytes() == 0
    view = first[3:]
    del first
    assert module.cached_hugepage_bytes() == 0  # the view holds the storage
    del view
    assert module.cached_hugepage_bytes() == 40 * MB
    again = large()
    assert again.data_ptr() == address and module.cached_hugepage_bytes() == 0
    del again
    assert _alloc.release_cache() == 40 * MB and module.cached_hugepage_bytes() == 0


def test_neighbouring_sizes_share_blocks():
    address = large(41).data_ptr()
    assert large(43).data_ptr() == address  # both round up to 44 MB
    assert module.cached_hugepage_bytes() == 44 * MB


def test_small_tensors_come_from_torch():
    assert module.hugepage_threshold() == _alloc.THRESHOLD  # Python decides for some outputs, C++ for others
    x = _alloc.empty((3, MB // 4), torch.float32, CPU)
    del x
    assert module.cached_hugepage_bytes() == 0
    assert _alloc.empty((3, 4), torch.int64, CPU).dtype == torch.int64


def test_the_bound_evicts_the_oldest():
    module.set_hugepage_bound(100 * MB)
    older, newer = large(40), large(48)
    del older
    del newer
    assert module.cached_hugepage_bytes() == 88 * MB
    another = large(56)
    del another
    assert module.cached_hugepage_bytes() == 56 * MB  # 40 and then 48 had to go
    too_large = large(101)  # would not be kept, so torch's allocator serves it
    del too_large
    assert module.cached_hugepage_bytes() <= 100 * MB


def test_switched_off():
    module.set_hugepages(False)
    x = large()
    del x
    assert module.cached_hugepage_bytes() == 0
    module.set_hugepages(True)
    x = large()
    module.set_hugepages(False)
    del x  # taken from the cache while it was on, freed while it is off
    assert module.cached_hugepage_bytes() == 0


def test_blocks_come_back_from_any_thread():
    tensors = [large() for _ in range(3)]
    threads = [threading.Thread(target=tensors.pop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert module.cached_hugepage_bytes() == 120 * MB


def test_two_live_tensors_never_share():
    tensors = [large() for _ in range(4)]
    for i, t in enumerate(tensors):
        t.fill_(i)
    assert all(bool((t == i).all()) for i, t in enumerate(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layout_and_dtype_are_those_of_torch(dtype):
    x = torch.zeros(4, 5, 256, 8192, dtype=dtype).transpose(1, 2)
    y = _alloc.empty_like(x)
    assert y.shape == x.shape and y.stride() == x.stride() and y.dtype == dtype and y.device == x.device
    assert not y.requires_grad and y.data_ptr() % (2 * MB) == 0
    z = _alloc.empty(x.shape, dtype, CPU)
    assert z.is_contiguous() and z.shape == x.shape


def test_outputs_are_ordinary_tensors():
    x = torch.randn(2304, 4096)
    y = fastattn.rms_norm(x)
    assert y.data_ptr() % (2 * MB) == 0
    y.mul_(2).add_(1)
    y.requires_grad_().sum().backward()
    assert y.grad.shape == x.shape and torch.equal(y.clone(), y.detach())
    with torch.inference_mode():
        assert fastattn.rms_norm(x).is_inference()


@pytest.mark.parametrize("grad", [False, True])
def test_every_op_uses_it(grad):
    x = torch.randn(1, 2304, 32, 128, requires_grad=grad)
    cos, sin = fastattn.ops.rope.tables.plain(2304, 128)
    rows = x.view(2304, 4096)
    for y in (fastattn.rope(x, cos, sin), fastattn.layer_norm(rows), fastattn.rms_norm(rows)):
        assert y.data_ptr() % (2 * MB) == 0
        if grad:
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert torch.isfinite(dx).all()
