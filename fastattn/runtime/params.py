"""Packs a kernel's parameters as its C++ struct lies in memory. The struct in csrc/cuda/*_params.h is the only contract:
its declaration is read here, so that Python and C++ cannot disagree."""

from __future__ import annotations

import functools
import itertools
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.runtime import sources

_SIZES = {"i32": 4, "u32": 4, "i64": 8, "u64": 8, "f32": 4, "pointer": 8, "map": 128}
_CODES = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "f32": "f", "pointer": "Q", "map": "128s"}
_ALIGNMENT = {"map": 64}
_KINDS = {"int": "i32", "u32": "u32", "i64": "i64", "u64": "u64", "float": "f32", "TensorMap": "map"}
_STRUCT = r"struct\s+{name}\s*\{{(.*?)\n\}};"
_FIELD = re.compile(r"^\s*(?:const\s+)?(\w+)\s*(\*?)\s*(.+)$")
_DECLARED = re.compile(r"^\s*(\*?)\s*(\w+)\s*(?:\[(\d+)\])?\s*$")


@dataclass(frozen=True, eq=False)
class Layout:
    """fields: (name, kind, offset) in the order of the declaration, an array of n as n fields name[0] … name[n-1]."""

    header: str
    name: str
    fields: tuple[tuple[str, str, int], ...]
    size: int
    packer: struct.Struct

    def __reduce__(self) -> Any:  # another process reads the declaration again
        return layout, (self.header, self.name)

    def pack(self, values: Sequence[Any]) -> bytes:
        """One value per field: int, float, tensor or None (a null pointer), encoded tensor map (128 bytes)."""
        if len(values) != len(self.fields):
            raise RuntimeError(f"{self.name} has {len(self.fields)} fields, got {len(values)} values")
        return self.packer.pack(*[_plain(v) for v in values])


def _plain(value: Any) -> Any:
    if value is None:
        return 0
    data_ptr = getattr(value, "data_ptr", None)
    return value if data_ptr is None else data_ptr()


@functools.cache
def layout(header: str, name: str) -> Layout:
    """The struct `name` of csrc/cuda/`header`. Its fields are int, u32, i64, u64, float, pointers, TensorMap and arrays
    of these; whatever else the header declares is not looked at."""
    found = re.search(_STRUCT.format(name=name), sources.read(header), re.DOTALL)
    if found is None:
        raise RuntimeError(f"{header} declares no struct {name}")
    fields: list[tuple[str, str, int]] = []
    codes, offset, widest = ["<"], 0, 1
    for field_name, kind in _declared(name, found[1]):
        alignment = _ALIGNMENT.get(kind, _SIZES[kind])
        padding = -offset % alignment
        codes.append("x" * padding + _CODES[kind])
        fields.append((field_name, kind, offset + padding))
        offset += padding + _SIZES[kind]
        widest = max(widest, alignment)
    codes.append("x" * (-offset % widest))
    packer = struct.Struct("".join(codes))
    return Layout(header, name, tuple(fields), packer.size, packer)


def _declared(struct_name: str, body: str) -> list[tuple[str, str]]:
    found = []
    for statement in re.sub(r"//[^\n]*", "", body).split(";"):
        if not statement.strip():
            continue
        parts = _FIELD.match(" ".join(statement.split()))
        if parts is None:
            raise RuntimeError(f"{struct_name}: cannot read the field {statement.strip()!r}")
        for i, declarator in enumerate(parts[3].split(",")):
            one = _DECLARED.match(declarator)
            pointer = one is not None and bool(one[1] or (i == 0 and parts[2]))
            kind = "pointer" if pointer else _KINDS.get(parts[1])
            if one is None or kind is None:
                raise RuntimeError(f"{struct_name}: cannot read the field {statement.strip()!r}")
            count = one[3]
            names = [one[2]] if count is None else [f"{one[2]}[{j}]" for j in range(int(count))]
            found += list(zip(names, itertools.repeat(kind)))
    return found
