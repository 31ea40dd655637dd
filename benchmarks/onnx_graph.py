"""One-node ONNX models without the onnx package: the few protobuf messages of onnx.proto3 that they need."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

FLOAT, INT32 = 1, 6  # TensorProto.DataType


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _attribute(name: str, value: int | float) -> bytes:
    if isinstance(value, float):
        body = _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, 1)
    else:
        body = _number(3, value) + _number(20, 2)
    return _bytes(1, name) + body


def _value(name: str, dtype: int, shape: Sequence[int]) -> bytes:
    dims = b"".join(_bytes(1, _number(1, size)) for size in shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, dtype) + _bytes(2, dims)))


Value = tuple[str, int, Sequence[int]]  # name, dtype, shape


def one_node(
    operator: str,
    domain: str,
    opset: int,
    inputs: Sequence[Value | None],
    outputs: Sequence[Value],
    attributes: Mapping[str, int | float],
) -> bytes:
    """A serialised ModelProto that applies `operator` to its inputs; None leaves an optional input out."""
    node = b"".join(_bytes(1, "" if value is None else value[0]) for value in inputs)
    node += b"".join(_bytes(2, value[0]) for value in outputs)
    node += _bytes(4, operator) + b"".join(_bytes(5, _attribute(k, v)) for k, v in attributes.items())
    node += _bytes(7, domain)
    graph = _bytes(1, node) + _bytes(2, operator)
    graph += b"".join(_bytes(11, _value(*value)) for value in inputs if value is not None)
    graph += b"".join(_bytes(12, _value(*value)) for value in outputs)
    opsets = _bytes(8, _bytes(1, "") + _number(2, opset)) if not domain else _bytes(8, _bytes(1, "") + _number(2, 17))
    if domain:
        opsets += _bytes(8, _bytes(1, domain) + _number(2, opset))
    return _number(1, 10) + _bytes(2, "fastattn") + _bytes(7, graph) + opsets
