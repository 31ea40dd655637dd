"""What a rope call must look like. The ops and their fakes both run `check_rope`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from fastattn.ops import _check


class RopeSpec(NamedTuple):
    """What a backend needs to know to say whether it takes the call."""

    op: str
    shapes: tuple[tuple[Any, ...], ...]
    rotary_dim: Any
    dtype: torch.dtype
    table_dtype: torch.dtype
    device: str
    interleaved: bool
    positions: bool

    def __str__(self) -> str:
        shapes = " and ".join(str(list(shape)) for shape in self.shapes)
        kind = "interleaved" if self.interleaved else "half-split"
        ids = ", position_ids" if self.positions else ""
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.table_dtype)]
        return f"{dtypes[0]} {shapes} on {self.device}, {kind} rotary_dim {self.rotary_dim}, tables {dtypes[1]}{ids}"


def check_tensors(op: str, x: Any, cos: Any, sin: Any, position_ids: Any, *k: Any) -> None:
    """What only the public function can see: before the Op, whose schema would complain in torch's words."""
    named = {"q" if k else "x": x, "cos": cos, "sin": sin}
    if k:
        named["k"] = k[0]
    if position_ids is not None:
        named["position_ids"] = position_ids
    for name, tensor in named.items():
        _check.is_tensor(op, name, tensor)
        if name in ("cos", "sin") and tensor.requires_grad and torch.is_grad_enabled():
            expectation = "a table without gradient (use fastattn.reference.rope to train it)"
            _check.fail(op, name, expectation, "requires_grad=True")


def check_rope(
    op: str,
    x: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    interleaved: bool,
) -> RopeSpec:
    """Raises ValueError in the user's words, or returns the specification. k is the second tensor of rope_qk."""
    name = "x" if op == "rope" else "q"
    _heads(op, name, x)
    if k is not None:
        _heads(op, "k", k)
        _check.same_dtype(op, "k", k, "q", x.dtype)
        _check.same_device(op, "k", k, "q", x.device)
        expected = (*x.shape[:-2], k.shape[-2], k.shape[-1])
        _check.shape(op, "k", k, expected, "[batch, seqlen, nheads_k, headdim] with q's batch and seqlen,")
    _table(op, "cos", cos, name, x)
    _table(op, "sin", sin, name, x)
    _check.shape(op, "sin", sin, tuple(cos.shape), "that of cos,")
    _check.same_dtype(op, "sin", sin, "cos", cos.dtype)
    rotary_dim = 2 * cos.shape[-1]
    for label, tensor in ((name, x), ("k", k)):
        if tensor is not None and rotary_dim > tensor.shape[-1]:
            fact = f"{cos.shape[-1]}"
            _check.fail(op, "cos", f"at most headdim / 2 of {label} ({tensor.shape[-1]} / 2) wide", fact)
    if position_ids is not None:
        _positions(op, name, position_ids, x)
    elif cos.shape[-2] < x.shape[-3]:
        _check.fail(op, "cos", f"at least seqlen of {name} ({x.shape[-3]}) rows long", cos.shape[-2])
    if not isinstance(interleaved, bool):
        _check.fail(op, "interleaved", "True or False", repr(interleaved))
    return RopeSpec(
        op=op,
        shapes=tuple(tuple(t.shape) for t in (x, k) if t is not None),
        rotary_dim=rotary_dim,
        dtype=x.dtype,
        table_dtype=cos.dtype,
        device=x.device.type,
        interleaved=interleaved,
        positions=position_ids is not None,
    )


def _heads(op: str, name: str, x: torch.Tensor) -> None:
    _check.is_tensor(op, name, x)
    if x.layout != torch.strided:
        _check.fail(op, name, "a strided tensor", f"layout {x.layout}")
    if x.dim() not in (3, 4):
        _check.fail(op, name, "[batch, seqlen, nheads, headdim] or packed [total, nheads, headdim]", tuple(x.shape))
    _check.floating(op, name, x)
    _check.unit_last_stride(op, name, x)


def _table(op: str, name: str, table: torch.Tensor, of: str, x: torch.Tensor) -> None:
    _check.is_tensor(op, name, table)
    _check.same_device(op, name, table, of, x.device)
    if table.dtype not in (x.dtype, torch.float32):
        _check.fail(op, name, f"of the dtype of {of} ({x.dtype}) or float32", table.dtype)
    if table.dim() not in (2, 3):
        _check.fail(op, name, "[seqlen, rotary_dim / 2] or [batch, seqlen, rotary_dim / 2]", tuple(table.shape))
    if table.dim() == 3:
        batch = x.shape[0] if x.dim() == 4 else 1
        if table.shape[0] != 1 and table.shape[0] != batch:
            _check.fail(op, name, f"of batch 1 or that of {of} ({batch})", table.shape[0])
    _check.unit_last_stride(op, name, table)


def _positions(op: str, of: str, ids: torch.Tensor, x: torch.Tensor) -> None:
    _check.is_tensor(op, "position_ids", ids)
    _check.same_device(op, "position_ids", ids, of, x.device)
    if ids.dtype not in (torch.int32, torch.int64):
        _check.fail(op, "position_ids", "int32 or int64", ids.dtype)
    batch = x.shape[0] if x.dim() == 4 else 1
    fits = ids.dim() in (1, 2) and ids.shape[-1] == x.shape[-3]
    if not fits or (ids.dim() == 2 and ids.shape[0] != 1 and ids.shape[0] != batch):
        expected = f"[seqlen] or [batch, seqlen] of {of} ({batch}, {x.shape[-3]})"
        _check.fail(op, "position_ids", expected, tuple(ids.shape))


def check_positions(op: str, position_ids: torch.Tensor | None, rows: int) -> None:
    """The range of the ids, which the fake cannot see. The native door has the same sentence."""
    if position_ids is None or position_ids.numel() == 0 or position_ids.device.type != "cpu":
        return
    low, high = (int(v) for v in torch.aminmax(position_ids))
    if low < 0 or high >= rows:
        expected = f"between 0 and {rows - 1} (cos has {rows} rows)"
        _check.fail(op, "position_ids", expected, low if low < 0 else high)


def cpu_objections(spec: RopeSpec) -> list[str]:
    """Why the native CPU kernel does not take a call."""
    from fastattn.runtime import native

    found = []
    if native.error() is not None:
        found.append(str(native.error()))
    if spec.device != "cpu":
        found.append(f"x is on {spec.device}, the kernel is for the CPU")
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found.append(f"dtype {str(spec.dtype).removeprefix('torch.')} is not among float32, bfloat16, float16")
    return found


def cuda_objections(spec: RopeSpec) -> list[str]:
    """Why the CUDA C++ kernel does not take a call."""
    from fastattn.runtime import cuda

    found = cuda.objections(spec.device)
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found.append(f"dtype {str(spec.dtype).removeprefix('torch.')} is not among float32, bfloat16, float16")
    if math.prod(spec.shapes[0][:-2]) >= 2**31:
        found.append("2147483648 positions or more")
    return found


def triton_objections(spec: RopeSpec) -> list[str]:
    """Why the Triton kernel does not take a call."""
    from fastattn.runtime import launch

    found = launch.objections(spec.device)
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found.append(f"dtype {str(spec.dtype).removeprefix('torch.')} is not among float32, bfloat16, float16")
    return found
