"""Compiling CUDA C++ at run time with the real NVRTC, and the cache of what it made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_probe import forget, probe, probe_sources  # noqa: F401

from fastattn.runtime import cache, env, jit, nvrtc

if jit.error() is not None:
    pytest.skip(jit.error() or "", allow_module_level=True)


@pytest.fixture
def folder(tmp_path: Path, probe_sources: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811
    """An empty cache, and warnings that were not given yet."""
    place = tmp_path / "cache"
    monkeypatch.setattr(env, "CUDA_CACHE", str(place))
    monkeypatch.setattr(cache, "_warned", False)
    cache.folder.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield place
    cache.folder.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made = []
    real = jit.compile

    def counting(kernel: Any, arch: str) -> jit.Compiled:
        made.append(f"{kernel} {arch}")
        return real(kernel, arch)

    monkeypatch.setattr(jit, "compile", counting)
    return made


def test_the_cubin_holds_the_kernel_under_its_mangled_name(folder):
    built = jit.compile(probe("float", "5"), "sm_80")
    assert built.image.startswith(b"\x7fELF") and built.name.encode() in built.image
    assert "probe_kernel" in built.name and not built.log


def test_a_specialisation_is_compiled_once_for_all_processes(folder, compilations):
    first = jit.load(probe(), "sm_80")
    forget()
    again = jit.load(probe(), "sm_80")
    assert (again.image, again.name) == (first.image, first.name)
    assert compilations == ["probe_kernel<float, 1> sm_80"]
    assert folder.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.name.startswith("probe_kernel-sm_80-") and entry.stat().st_mode & 0o077 == 0


def test_what_could_change_the_code_changes_the_entry(folder, probe_sources, monkeypatch):  # noqa: F811
    def name(arch: str = "sm_80", **facts: Any) -> str:
        forget()
        return jit.entry_of(probe(*facts.get("constants", ())), arch)

    names = [name(), name("sm_90a"), name(constants=("float", "2"))]
    assert name() == names[0]
    (probe_sources / "unrelated.cuh").write_text("anything")
    assert name() == names[0]
    for file in ("probe_more.cuh", "probe_params.h", "probe.cuh"):  # what it includes, to any depth
        (probe_sources / file).write_text((probe_sources / file).read_text() + "\n")
        names.append(name())
    library = nvrtc.library()
    monkeypatch.setattr(nvrtc, "library", lambda: library._replace(version=(99, 0)))
    names.append(name())
    monkeypatch.setattr(nvrtc, "library", lambda: library._replace(size=library.size + 1))
    names.append(name())
    monkeypatch.setattr(jit, "OPTIONS", (*jit.OPTIONS, "-DX"))
    names.append(name())
    assert len(set(names)) == len(names)


def test_a_changed_header_is_compiled_in(folder, probe_sources):  # noqa: F811
    before = jit.load(probe(), "sm_80")
    text = (probe_sources / "probe_more.cuh").read_text()
    (probe_sources / "probe_more.cuh").write_text(text.replace("x + T(by)", "x * T(7 + by)"))
    forget()
    assert jit.load(probe(), "sm_80").image != before.image


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign"])
def test_a_damaged_entry_is_made_again(folder, compilations, damage):
    good = jit.load(probe(), "sm_80")
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    middle = len(whole) // 2
    entry.write_bytes(
        {
            "truncated": whole[:middle],
            "empty": b"",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "foreign": b"something else altogether",
        }[damage]
    )
    assert jit.load(probe(), "sm_80").image == good.image
    assert len(compilations) == 2 and entry.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused_with_one_warning(folder, compilations, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.warns(RuntimeWarning, match=f"nobody else can write.*mode {mode:o}") as given:
        for _ in range(2):
            assert jit.load(probe(), "sm_80").image
            cache.folder.cache_clear()
    assert len(given) == 1 and len(compilations) == 2 and not list(folder.iterdir())


def test_a_folder_of_another_user_is_refused(folder, compilations, monkeypatch):
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(RuntimeWarning, match="must be a folder that belongs to this user"):
        jit.load(probe(), "sm_80")
    assert not list(folder.iterdir())


def test_an_entry_of_another_user_is_not_believed(folder, compilations, monkeypatch):
    jit.load(probe(), "sm_80")
    real = os.fstat
    monkeypatch.setattr(cache.os, "fstat", lambda file: os.stat_result((*real(file)[:4], 12345, *real(file)[5:])))
    jit.load(probe(), "sm_80")
    assert len(compilations) == 2


def _refuse(number: int) -> Any:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize(
    "where, number",
    [("tempfile.mkstemp", errno.EROFS), ("tempfile.mkstemp", errno.EACCES), ("os.replace", errno.ENOSPC)],
)
def test_a_disk_that_cannot_be_written_costs_the_caching_alone(folder, compilations, monkeypatch, where, number):
    module, name = where.split(".")
    monkeypatch.setattr(getattr(cache, module), name, _refuse(number))
    with pytest.warns(RuntimeWarning, match=f"cannot be written: .*{os.strerror(number)}") as given:
        for _ in range(2):
            assert jit.load(probe(), "sm_80").image
    assert len(given) == 1 and len(compilations) == 2 and not list(folder.iterdir())


def test_a_place_that_is_no_folder_costs_the_caching_alone(folder, compilations):
    folder.write_text("a file")
    with pytest.warns(RuntimeWarning, match="the folder cannot be used"):
        assert jit.load(probe(), "sm_80").image


def test_the_cache_can_be_switched_off(folder, compilations, monkeypatch):
    monkeypatch.setattr(env, "CUDA_CACHE", "off")
    for _ in range(2):
        jit.load(probe(), "sm_80")
    assert len(compilations) == 2 and not folder.exists()


@pytest.mark.parametrize("home, below", [("xdg", "xdg/fastattn/cuda"), ("", ".cache/fastattn/cuda")])
def test_the_cache_lies_where_the_desktop_standard_wants_it(folder, tmp_path, monkeypatch, home, below):
    monkeypatch.setattr(env, "CUDA_CACHE", None)
    monkeypatch.setattr(env, "CACHE_HOME", str(tmp_path / home) if home else None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / below


def test_processes_fill_one_cache_at_the_same_time(folder, probe_sources):  # noqa: F811
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from fastattn.runtime import sources, jit;"
        f"sources._PLACES = (Path({str(probe_sources)!r}),); import cuda_probe;"
        "print([len(jit.load(cuda_probe.probe('float', str(i)), 'sm_80').image) for i in range(6)])"
    )
    environment = os.environ | {"FASTATTN_CUDA_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=environment, cwd=root, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running) and len(set(printed)) == 1
    names = [entry.name for entry in folder.iterdir()]
    assert len(names) == 6 and all(name.startswith("probe_kernel-sm_80-") for name in names)


def test_a_compile_error_shows_the_kernel_its_constants_and_the_log(folder):
    with pytest.raises(RuntimeError) as caught:
        jit.load(probe("Unknown", "5"), "sm_90a")
    words = str(caught.value)
    assert "probe_kernel<Unknown, 5>" in words and "probe.cuh" in words and "sm_90a" in words and "-std=c++17" in words
    assert 'identifier "Unknown" is undefined' in words and "NVRTC" in words
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "arch, expected",
    [(80, "sm_80"), (86, "sm_86"), (90, "sm_90a"), (100, "sm_100"), (103, "compute_100"), (130, "compute_120")],
)
def test_each_gpu_gets_code_that_it_runs(probe_sources, monkeypatch, arch, expected):  # noqa: F811
    library = nvrtc.library()
    monkeypatch.setattr(nvrtc, "library", lambda: library._replace(archs=(75, 80, 86, 89, 90, 100, 120)))
    assert jit.target(probe(), arch) == expected
    assert jit.compile(probe(), expected).image.startswith(b"\x7fELF" if expected.startswith("sm") else b"//")


def test_a_compiler_too_old_for_the_kernel_says_so(probe_sources, monkeypatch):  # noqa: F811
    library = nvrtc.library()
    monkeypatch.setattr(nvrtc, "library", lambda: library._replace(version=(11, 7), archs=(80, 86)))
    with pytest.raises(RuntimeError, match=r"NVRTC 11\.7 .* cannot compile probe_kernel<float, 1> for sm_90"):
        jit.target(probe(hopper=True), 90)
    with pytest.raises(RuntimeError, match=r"runs on compute capability 9\.0 alone, got 10\.0"):
        jit.target(probe(hopper=True), 100)
    monkeypatch.setattr(nvrtc, "library", lambda: library._replace(version=(99, 0), archs=(90, 100)))
    with pytest.raises(RuntimeError, match=r"NVRTC 99\.0 .* for sm_80, it knows \(90, 100\)"):
        jit.target(probe(), 80)


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """NVRTC's search among given places, of which those with "broken" in their name do not load."""

    def find(cuda_of_torch: str | None, *places: str) -> str:
        def load(place: str) -> nvrtc.Library:
            if "broken" in place:
                raise OSError("cannot open")
            return nvrtc.Library(None, place, (13, 0), (90,))

        monkeypatch.setattr(nvrtc, "_places", lambda: iter(places))
        monkeypatch.setattr(nvrtc, "_load", load)
        monkeypatch.setattr(torch.version, "cuda", cuda_of_torch)
        nvrtc.library.cache_clear()
        return nvrtc.library().place

    yield find
    nvrtc.library.cache_clear()


def test_the_compiler_of_torchs_cuda_version_comes_first(search):
    both = ("wheel/libnvrtc.so.13", "wheel/libnvrtc.so.12")
    assert search("12.8", *both) == both[1] and search("13.0", *both) == both[0] and search(None, *both) == both[0]
    assert search("12.8", "broken/libnvrtc.so.12", *both) == both[1]
    with pytest.raises(OSError, match=r"pip install nvidia-cuda-nvrtc.*broken/a\.so: cannot open; broken/b\.so"):
        search("13.0", "broken/a.so", "broken/b.so")


def test_it_is_found_in_wheels_of_any_version_in_torch_and_in_the_toolkit(tmp_path, monkeypatch):
    names = (
        "nvidia/cu13/lib/libnvrtc.so.13",
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "torch/lib/libnvrtc-672ee683.so.11.2",
        "toolkit/lib64/libnvrtc.so.12.4",
        "toolkit/targets/sbsa-linux/lib/libnvrtc.so.12.4",
    )
    others = ("nvidia/cu13/lib/libnvrtc-builtins.so.13.0", "nvidia/cu13/lib/libnvrtc.alt.so.13")
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wheels = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: wheels)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(env, "CUDA_HOME", str(tmp_path / "toolkit"))
    found = [place for place in nvrtc._places() if place.startswith(str(tmp_path))]
    assert sorted(found) == sorted(str(tmp_path / name) for name in names)
    assert list(nvrtc._places())[-2:] == ["libnvrtc.so.13", "libnvrtc.so.12"]


def test_a_compiler_from_before_hopper_is_an_objection(monkeypatch):
    old = nvrtc.Library(None, "libnvrtc.so.11.2", (11, 8), (80, 86))
    monkeypatch.setattr(nvrtc, "library", lambda: old)
    assert jit.error() == "NVRTC 12.0 or newer, got NVRTC 11.8 (libnvrtc.so.11.2)"


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", _refuse(errno.ENOENT))
    assert os.strerror(errno.ENOENT) in (jit.error() or "")
