"""The launcher of the CUDA kernels against a driver of our own (tests/stub_driver.cpp), which notes what it is told."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_cost
import pytest
import torch
from cuda_probe import forget, probe, probe_sources  # noqa: F401

from fastattn.runtime import cuda, gpu, jit, native

triton = pytest.importorskip("triton")  # its wheel has NVIDIA's cuda.h
if native.error() is not None:
    pytest.skip(native.error() or "", allow_module_level=True)
CSRC = Path(__file__).parent.parent / "csrc" / "cuda"
CUBIN = b"\x7fELF and so on"
GPUS = [torch.device("cuda", i) for i in (0, 1)]
BOX = (8, 4)


@pytest.fixture(scope="module")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    compiler = shutil.which("g++") or shutil.which("c++") or pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("stub") / "libcuda_stub.so"
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("stub_driver.cpp")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", f"-I{header}", source, "-o", library], check=True)
    native.module().use_driver(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.stub_notes.restype = ctypes.c_char_p
    loaded.stub_current.restype = ctypes.c_long
    yield loaded
    native.module().use_driver(None)
    forget()


@pytest.fixture
def stub(stub_library: ctypes.CDLL, probe_sources: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:  # noqa: F811
    """Two GPUs with the compute capabilities 9.0 and 8.0, whose streams are 1000 and 1001; nothing is compiled."""
    monkeypatch.setattr(gpu, "arch_of", lambda index: (90, 80)[index])
    monkeypatch.setattr(gpu, "stream_of", lambda index: 1000 + index)
    monkeypatch.setattr(jit, "target", lambda kernel, arch: f"sm_{arch}")
    monkeypatch.setattr(jit, "load", lambda kernel, arch: jit.Compiled(CUBIN, f"mangled_{kernel.name}", ""))
    stub_library.stub_forget()
    stub_library.stub_silence(0)
    stub_library.stub_make_current(0)
    stub_library.stub_param_bytes(probe().layout.size)
    return stub_library


def _notes(stub: ctypes.CDLL, kind: str) -> list[dict[str, str]]:
    """The calls of one kind: what stands before the first "=" of each word, and after it."""
    lines = [line.split() for line in stub.stub_notes().decode().splitlines()]
    return [dict(w.partition("=")[::2] for w in line[1:]) for line in lines if line[0] == kind]


def _values(map_of: torch.Tensor, **changed: Any) -> list[Any]:
    a = torch.empty(3)
    fields = {
        "x": torch.empty(5),
        "rows": -7,
        "stride": (1 << 40, -3, 0),
        "scale": 0.25,
        "flags": 0xFFFFFFFF,
        "more": 1,
        "seed": (1 << 64) - 1,
        "map": cuda.TensorMap(map_of, (8, 16), (8,), BOX, 0),
        "a": a,
        "b": None,
        "tail": True,
    } | changed
    return [v for name, f in fields.items() for v in (f if name == "stride" else (f,))]


def test_a_kernel_gets_the_bytes_of_its_struct(stub):
    kernel, tensor = probe(), torch.empty(16, 8, dtype=torch.bfloat16)
    values = _values(tensor)
    cuda.run(kernel, (2, 3, 4), values, GPUS[0])
    (launch,) = _notes(stub, "launch")
    encoded = tensor.data_ptr().to_bytes(8, "little") + b"\x5a" * 120
    expected = kernel.layout.pack([encoded if isinstance(v, cuda.TensorMap) else v for v in values])
    assert bytes.fromhex(launch.pop("params")) == expected
    assert launch == {
        "context": "140",
        "stream": "1000",
        "function": "77",
        "extra": "0",
        "grid": "2,3,4",
        "block": "64,1,1",
        "shared": "0",
        "cluster": "1",
        "aligned": "1",
    }


def test_a_view_gives_the_address_of_its_first_element(stub):
    kernel, x = probe(), torch.arange(40.0).view(4, 10)
    cuda.run(kernel, (1, 1, 1), _values(torch.empty(16, 8), x=x[1:, 2:], a=torch.nn.Parameter(x)), GPUS[0])
    (launch,) = _notes(stub, "launch")
    packed = bytes.fromhex(launch["params"])
    offsets = {name: offset for name, _, offset in kernel.layout.fields}
    at = {name: int.from_bytes(packed[offsets[name] : offsets[name] + 8], "little") for name in ("x", "a", "b")}
    assert at == {"x": x.data_ptr() + 48, "a": x.data_ptr(), "b": 0}


def test_an_empty_grid_launches_nothing(stub):
    cuda.run(probe(), (1, 0, 1), _values(torch.empty(16, 8)), GPUS[0])
    assert not stub.stub_notes()


def test_each_device_has_its_context_stream_and_architecture(stub, monkeypatch):
    compiled = []
    monkeypatch.setattr(jit, "load", lambda kernel, arch: compiled.append(arch) or jit.Compiled(CUBIN, "mangled", ""))
    for device in (*GPUS, *GPUS):
        cuda.run(probe(), (1, 1, 1), _values(torch.empty(16, 8)), device)
    assert compiled == ["sm_90", "sm_80"]
    assert [n["context"] for n in _notes(stub, "load")] == ["140", "141"]
    assert [(n["context"], n["stream"]) for n in _notes(stub, "launch")] == [("140", "1000"), ("141", "1001")] * 2
    assert stub.stub_current() == 0


def test_the_current_context_of_the_caller_is_kept(stub):
    stub.stub_make_current(141)
    cuda.run(probe(), (1, 1, 1), _values(torch.empty(16, 8)), GPUS[0])
    with pytest.raises(RuntimeError):
        cuda.run(probe(), (1, 13, 1), _values(torch.empty(16, 8)), GPUS[0])
    assert stub.stub_current() == 141


def test_a_thread_without_a_context_may_launch_and_encode(stub):
    found = []
    tensor = torch.empty(16, 8, dtype=torch.int64)  # of a type whose map no other test has encoded
    values = _values(tensor, map=cuda.TensorMap(tensor, (8, 16), (8,), BOX))
    thread = threading.Thread(target=lambda: found.append(cuda.run(probe(), (1, 1, 1), values, GPUS[1])))
    thread.start()
    thread.join()
    assert found == [None] and len(_notes(stub, "encode")) == 1
    assert [n["context"] for n in _notes(stub, "launch")] == ["141"]


def test_loading_is_allowed_while_a_graph_is_captured_and_launching_does_nothing_else(stub):
    values = _values(torch.empty(16, 8, dtype=torch.int32))
    for _ in range(3):
        cuda.run(probe(), (1, 1, 1), values, GPUS[0])
    calls = [line.split()[0] for line in stub.stub_notes().decode().splitlines()]
    assert calls == ["load", "function", "encode", "launch", "launch", "launch"]
    assert _notes(stub, "load")[0]["relaxed"] == "1"


def test_shared_memory_and_clusters_reach_the_driver(stub):
    cuda.run(probe("float", "2", shared=200 << 10, cluster=2), (4, 1, 1), _values(torch.empty(16, 8)), GPUS[0])
    cuda.run(probe("float", "3", shared=64, cluster=16), (16, 1, 1), _values(torch.empty(16, 8)), GPUS[0])
    assert _notes(stub, "attribute") == [{"shared": str(200 << 10)}, {"shared": "64"}, {"wide_clusters": "1"}]
    assert [(n["shared"], n["cluster"]) for n in _notes(stub, "launch")] == [(str(200 << 10), "2"), ("64", "16")]


@pytest.mark.parametrize("swizzle, code", [(0, "0"), (32, "1"), (64, "2"), (128, "3")])
def test_a_tensor_map_is_encoded_as_the_driver_wants_it(stub, swizzle, code):
    tensor = torch.empty(3, 24, 5, 16, dtype=torch.bfloat16)
    box = ((swizzle or 32) // 2 if swizzle < 64 else 16, 24)
    mapped = cuda.TensorMap(tensor, (16, 24, 5, 3), (80, 16, 1920), (*box, 1, 1), swizzle)
    cuda.run(probe(), (1, 1, 1), _values(tensor, map=mapped), GPUS[0])
    (encoded,) = _notes(stub, "encode")
    assert encoded == {
        "type": "9",
        "sizes": "16,24,5,3,",
        "strides": "160,32,3840,",
        "box": f"{box[0]}:1,24:1,1:1,1:1,",
        "interleave": "0",
        "swizzle": code,
        "promotion": "2",
        "fill": "0",
    }


def test_a_tensor_map_is_encoded_once_and_follows_its_tensor(stub):
    kernel = probe()
    offset = next(o for name, _, o in kernel.layout.fields if name == "map")
    tensors = [torch.empty(16, 8, dtype=torch.float16) for _ in range(3)]
    maps = [cuda.TensorMap(tensor, (8, 15), (8,), BOX) for tensor in tensors]  # sizes that no other test has
    for mapped in maps:
        cuda.run(kernel, (1, 1, 1), _values(mapped.tensor, map=mapped), GPUS[0])
    found = [bytes.fromhex(n["params"])[offset : offset + 8] for n in _notes(stub, "launch")]
    assert [int.from_bytes(f, "little") for f in found] == [t.data_ptr() for t in tensors]
    assert len(_notes(stub, "encode")) == 1
    other = maps[0]._replace(tensor=tensors[0].to(torch.bfloat16))
    cuda.run(kernel, (1, 1, 1), _values(tensors[0], map=other), GPUS[0])
    assert [n["type"] for n in _notes(stub, "encode")] == ["6", "9"]


@pytest.mark.parametrize(
    "fields, rule",
    [
        ({"sizes": (8,) * 6, "strides": (8,) * 5, "box": (8,) * 6}, "rank 1 to 5"),
        ({"strides": (6,)}, "multiples of 16 bytes"),
        ({"strides": ()}, "one fewer than sizes"),
        ({"strides": (0,)}, "multiples of 16 bytes"),
        ({"box": (8, 257)}, "1 to 256"),
        ({"box": (6, 4)}, "a multiple of 16 bytes"),
        ({"swizzle": 16}, "0, 32, 64 or 128"),
        ({"box": (32, 4), "swizzle": 32}, "within the swizzle"),
        ({"sizes": (8, 0)}, "1 to 2\\^31"),
        ({"tensor": torch.empty(16, 8, dtype=torch.complex64)}, "one that TMA knows"),
        ({"tensor": torch.empty(64, dtype=torch.float16)[1:]}, "multiple of 16 bytes"),
    ],
)
def test_a_tensor_map_that_breaks_a_rule_of_the_driver_is_refused(stub, fields, rule):
    good = cuda.TensorMap(torch.empty(16, 8, dtype=torch.float16), (8, 16), (8,), BOX)
    good.check()
    with pytest.raises(ValueError, match=rule):
        cuda.run(probe(), (1, 1, 1), _values(good.tensor, map=good._replace(**fields)), GPUS[0])
    assert not _notes(stub, "launch")


def test_an_error_of_the_driver_names_the_kernel_and_what_was_asked(stub):
    with pytest.raises(
        RuntimeError, match=r"probe_kernel<float, 1>.*\(1, 13, 1\).*64 threads.*CUDA_ERROR_INVALID_VALUE"
    ):
        cuda.run(probe(), (1, 13, 1), _values(torch.empty(16, 8)), GPUS[0])
    with pytest.raises(RuntimeError, match=r"probe_kernel<float, 4>.*cuFuncSetAttribute.*invalid argument"):
        cuda.run(probe("float", "4", shared=300 << 10), (1, 1, 1), _values(torch.empty(16, 8)), GPUS[0])
    with pytest.raises(RuntimeError, match="at most 2\\^31-1 × 65535 × 65535"):
        cuda.run(probe(), (1, 1 << 16, 1), _values(torch.empty(16, 8)), GPUS[0])


def test_code_that_the_driver_does_not_take_is_reported_with_its_log(stub, monkeypatch):
    monkeypatch.setattr(jit, "load", lambda kernel, arch: jit.Compiled(b"rubbish", "mangled", ""))
    with pytest.raises(RuntimeError, match=r"(?s)probe_kernel<float, 1>.*INVALID_IMAGE.*CUDA 12\.8.*log of ptxas"):
        cuda.run(probe(), (1, 1, 1), _values(torch.empty(16, 8)), GPUS[0])
    monkeypatch.setattr(jit, "load", lambda kernel, arch: jit.Compiled(CUBIN, "absent", ""))
    with pytest.raises(RuntimeError, match="cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND"):
        cuda.run(probe(), (1, 1, 1), _values(torch.empty(16, 8)), GPUS[0])


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"rows": 1 << 31}, "rows must be an integer that its type holds, got 2147483648"),
        ({"rows": 0.5}, "rows must be an integer"),
        ({"flags": -1}, "flags must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        ({"stride": (1 << 63, 0, 0)}, r"stride\[0\] must be an integer"),
        ({"scale": "1"}, "scale must be a number"),
        ({"x": 4096}, "x must be a tensor or None, got 4096"),
        ({"x": torch.empty(3, device="meta")}, "x must be a tensor on cuda:0"),
        ({"map": None}, "map must be a TensorMap"),
    ],
)
def test_a_value_that_its_field_cannot_hold_is_refused(stub, changed, words):
    with pytest.raises(TypeError, match=f"probe_kernel<float, 1>: {words}"):
        cuda.run(probe(), (1, 1, 1), _values(torch.empty(16, 8), **changed), GPUS[0])
    with pytest.raises(RuntimeError, match="13 fields, got 12 values"):
        cuda.run(probe(), (1, 1, 1), _values(torch.empty(16, 8))[:-1], GPUS[0])


def test_threads_launch_at_the_same_time(stub):
    kernel, tensor = probe(), torch.empty(16, 8)
    failures: list[BaseException] = []

    def work(device: torch.device) -> None:
        try:
            for i in range(200):
                cuda.run(kernel, (1, 1, 1), _values(tensor, rows=i), device)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(GPUS[i % 2],)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    launches = _notes(stub, "launch")
    offset = next(o for name, _, o in kernel.layout.fields if name == "rows")
    rows = [(n["context"], int.from_bytes(bytes.fromhex(n["params"])[offset : offset + 4], "little")) for n in launches]
    assert sorted(rows) == sorted((context, i) for context in ("140", "141") for i in range(200) for _ in range(3))
    assert all((n["context"], n["stream"]) in (("140", "1000"), ("141", "1001")) for n in launches)


@pytest.mark.parametrize(
    "header, struct", [("attention_params.h", "AttentionParams"), ("attention_sm90_params.h", "AttentionSm90Params")]
)
def test_a_launch_costs_the_host_little(stub, probe_sources, capsys, header, struct):  # noqa: F811
    (probe_sources / header).write_text((CSRC / header).read_text())
    kernel = cuda.kernel("probe.cuh", "probe_kernel", ("float", "1"), (header, struct), 128, shared=1 << 16)
    tensor, device = torch.empty(16, 8, dtype=torch.bfloat16), GPUS[0]
    mapped = cuda.TensorMap(tensor, (8, 16), (8,), BOX)
    of_kind = {"pointer": tensor, "map": mapped, "f32": 0.5}
    values = [of_kind.get(kind, 3) for _, kind, _ in kernel.layout.fields]
    cuda.run(kernel, (4, 2, 1), values, device)
    stub.stub_silence(1)
    limit = 8.0
    found = host_cost.cost(lambda: cuda.run(kernel, (4, 2, 1), values, device), limit)
    maps = sum(kind == "map" for _, kind, _ in kernel.layout.fields)
    with capsys.disabled():
        print(f"\n  {struct}: {len(values)} values, {maps} tensor maps: {found:.2f} µs of the host per launch")
    assert found <= limit
