"""Python packs a kernel's parameters as a C++ compiler lays them out."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_probe import PARAMS, probe_sources  # noqa: F401

from fastattn.runtime import params, sources

# What of CUDA the headers of parameters reach through ptx/core.cuh, in the words of an ordinary compiler.
DIALECT = """
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
unsigned long __cvta_generic_to_shared(const void*);
#include <cstddef>
#include <cstdio>
"""
HEADERS = sorted(p.name for p in sources.folder().glob("*_params.h"))


def _structs(header: str) -> list[str]:
    return re.findall(r"^struct (\w+) \{", sources.read(header), re.MULTILINE)


def _facts_of_the_compiler(folder: Path, header: str, fields: dict[str, list[str]]) -> dict[str, int]:
    """sizeof every struct and offsetof every field, as g++ says."""
    compiler = shutil.which("g++") or shutil.which("c++") or pytest.skip("no C++ compiler")
    prints = []
    for struct, names in fields.items():
        prints.append(f'std::printf("{struct} %zu\\n", sizeof({struct}));')
        prints += [f'std::printf("{struct}.{n} %zu\\n", offsetof({struct}, {n}));' for n in names]
    source = folder / "layout.cpp"
    source.write_text(f"{DIALECT}#include <{header}>\nint main() {{\n" + "\n".join(prints) + "\n}\n")
    command = [compiler, "-std=c++17", "-w", f"-I{sources.folder()}", source, "-o", folder / "layout"]
    subprocess.run(command, check=True, capture_output=True)
    printed = subprocess.run([folder / "layout"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in printed.splitlines())}


def _agree(folder: Path, header: str) -> None:
    layouts = {struct: params.layout(header, struct) for struct in _structs(header)}
    facts = _facts_of_the_compiler(folder, header, {s: [n for n, _, _ in x.fields] for s, x in layouts.items()})
    ours = {s: x.size for s, x in layouts.items()}
    ours |= {f"{s}.{name}": offset for s, x in layouts.items() for name, _, offset in x.fields}
    assert ours == facts and layouts


@pytest.mark.parametrize("header", HEADERS)
def test_layouts_agree_with_the_compiler(header, tmp_path):
    _agree(tmp_path, header)


def test_layouts_with_every_kind_of_field_agree_with_the_compiler(probe_sources, tmp_path):  # noqa: F811
    _agree(tmp_path, "probe_params.h")


def test_every_field_of_a_declaration_is_read(probe_sources):  # noqa: F811
    layout = params.layout("probe_params.h", "ProbeParams")
    assert [(name, kind) for name, kind, _ in layout.fields] == [
        ("x", "pointer"),
        ("rows", "i32"),
        ("stride[0]", "i64"),
        ("stride[1]", "i64"),
        ("stride[2]", "i64"),
        ("scale", "f32"),
        ("flags", "u32"),
        ("more", "u32"),
        ("seed", "u64"),
        ("map", "map"),
        ("a", "pointer"),
        ("b", "pointer"),
        ("tail", "i32"),
    ]
    again = pickle.loads(pickle.dumps(layout))
    assert again is layout


def test_values_are_packed_where_their_fields_lie(probe_sources):  # noqa: F811
    layout = params.layout("probe_params.h", "ProbeParams")
    x, encoded = torch.empty(7), bytes(range(128))
    packed = layout.pack([x[3:], -2, 1, -1, 1 << 40, 0.5, 7, 0xFFFFFFFF, (1 << 64) - 1, encoded, None, x, 9])
    at = {name: packed[offset:] for name, _, offset in layout.fields}
    assert len(packed) == layout.size
    assert int.from_bytes(at["x"][:8], "little") == x.data_ptr() + 12
    assert int.from_bytes(at["rows"][:4], "little", signed=True) == -2
    assert int.from_bytes(at["stride[2]"][:8], "little") == 1 << 40
    assert at["map"][:128] == encoded and at["a"][:8] == bytes(8) and at["tail"][0] == 9
    with pytest.raises(RuntimeError, match="13 fields, got 1 values"):
        layout.pack([x])


@pytest.mark.parametrize(
    "declared, words",
    [
        ("bool flag;", "cannot read the field 'bool flag'"),
        ("int a = 3;", "cannot read the field 'int a = 3'"),
        ("double x;", "cannot read the field 'double x'"),
        ("std::pair<int, int> p;", "cannot read the field"),
    ],
)
def test_a_field_that_python_cannot_pack_is_refused(probe_sources, declared, words):  # noqa: F811
    text = PARAMS.replace("int tail;", declared)
    (probe_sources / "probe_params.h").write_text(text)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        params.layout("probe_params.h", "ProbeParams")
    with pytest.raises(RuntimeError, match=r"probe_params\.h declares no struct Absent"):
        params.layout("probe_params.h", "Absent")
