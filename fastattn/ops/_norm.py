"""What layer_norm and rms_norm share: the specification of a call, its sentences, and the native doors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from fastattn.ops import _alloc, _check, _eager
from fastattn.runtime import cuda, launch, native

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NormSpec(NamedTuple):
    """What a backend needs to know to say whether it takes the call."""

    op: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    device: str
    residual: bool

    def __str__(self) -> str:
        weight = "no weight" if self.weight_dtype is None else f"weight {_short(self.weight_dtype)}"
        residual = ", residual" if self.residual else ""
        return f"x {_short(self.dtype)} {list(self.shape)} on {self.device}, {weight}{residual}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Before the Op, whose schema would complain in torch's words. Only the first may not be None."""
    for i, (name, tensor) in enumerate(tensors.items()):
        if tensor is not None or i == 0:
            _check.is_tensor(op, name, tensor)


def check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> NormSpec:
    """Raises ValueError in the user's words, or returns the specification. Runs identically on fake tensors."""
    _rows(op, "x", x)
    _check.floating(op, "x", x)
    if residual is not None:
        _rows(op, "residual", residual)
        _check.shape(op, "residual", residual, tuple(x.shape), "that of x,")
        _check.same_dtype(op, "residual", residual, "x", x.dtype)
        _check.same_device(op, "residual", residual, "x", x.device)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _vector(op, name, vector, x)
    if weight is not None and bias is not None:
        _check.same_dtype(op, "bias", bias, "weight", weight.dtype)
    _check.number(op, "eps", eps)
    if eps < 0:
        _check.fail(op, "eps", "at least 0", eps)
    vector = weight if weight is not None else bias
    return NormSpec(
        op=op,
        shape=tuple(x.shape),
        dtype=x.dtype,
        weight_dtype=None if vector is None else vector.dtype,
        device=x.device.type,
        residual=residual is not None,
    )


def _rows(op: str, name: str, tensor: torch.Tensor) -> None:
    _check.is_tensor(op, name, tensor)
    if tensor.layout != torch.strided:
        _check.fail(op, name, "a strided tensor", f"layout {tensor.layout}")
    if tensor.dim() < 1:
        _check.fail(op, name, "at least one-dimensional (the last axis is normalised)", "a scalar")
    _check.unit_last_stride(op, name, tensor)


def _vector(op: str, name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    _check.is_tensor(op, name, tensor)
    _check.shape(op, name, tensor, (x.shape[-1],), "[cols] of x,")
    _check.unit_last_stride(op, name, tensor)
    _check.same_device(op, name, tensor, "x", x.device)
    if tensor.dtype not in (x.dtype, torch.float32):
        _check.fail(op, name, f"of the dtype of x ({x.dtype}) or float32", tensor.dtype)


def cpu_objections(spec: NormSpec) -> list[str]:
    """Why the native CPU kernels do not take a norm."""
    found = []
    if native.error() is not None:
        found.append(str(native.error()))
    if spec.device != "cpu":
        found.append(f"x is on {spec.device}, the kernels are for the CPU")
    if spec.dtype not in NATIVE_DTYPES:
        found.append(f"dtype {_short(spec.dtype)} is not among float32, bfloat16, float16")
    if len(spec.shape) > 8:
        found.append(f"x has {len(spec.shape)} dimensions, the kernels take 8")
    return found


def triton_objections(spec: NormSpec) -> list[str]:
    """Why the Triton kernels do not take a norm."""
    found = launch.objections(spec.device)
    if spec.dtype not in NATIVE_DTYPES:
        found.append(f"dtype {_short(spec.dtype)} is not among float32, bfloat16, float16")
    return found


def cuda_objections(spec: NormSpec) -> list[str]:
    """Why the CUDA C++ kernels do not take a norm."""
    found = cuda.objections(spec.device)
    if spec.dtype not in NATIVE_DTYPES:
        found.append(f"dtype {_short(spec.dtype)} is not among float32, bfloat16, float16")
    if math.prod(spec.shape[:-1]) >= 2**31 or spec.shape[-1] >= 2**31:
        found.append("x has 2147483648 rows or columns, or more")
    return found


def cpu_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    *,
    centred: bool,
    weight_offset: float = 0.0,
    round_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """y, x + residual (None without residual), mean (None unless centred), rstd."""
    y = _alloc.empty(x.shape, x.dtype, x.device)
    total = None if residual is None else _alloc.empty(x.shape, x.dtype, x.device)
    mean = _alloc.empty(x.shape[:-1], torch.float32, x.device) if centred else None
    rstd = _alloc.empty(x.shape[:-1], torch.float32, x.device)
    native.module().norm_fwd(
        *(x, weight, bias, residual, y, total, mean, rstd),
        *(centred, eps, weight_offset, round_first, torch.get_num_threads()),
    )
    return y, total, mean, rstd


def cpu_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    *,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dx, dweight, dbias; a dtype of None means that this gradient is not wanted."""
    dx = _alloc.empty(x.shape, x.dtype, x.device)
    cols = x.shape[-1:]
    dweight = None if dweight_dtype is None else torch.empty(cols, dtype=dweight_dtype, device=x.device)
    dbias = None if dbias_dtype is None else torch.empty(cols, dtype=dbias_dtype, device=x.device)
    native.module().norm_bwd(
        *(dy, dsum, x, weight, mean, rstd, dx, dweight, dbias),
        *(mean is not None, weight_offset, torch.get_num_threads()),
    )
    return dx, dweight, dbias


def short_forward(
    notes: Any,
    backend: str | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    *,
    centred: bool,
    weight_offset: float = 0.0,
    rounding: str = "last",
) -> tuple[Any, ...] | None:
    """`cpu_forward` by one native call that checks everything itself, or None. Then notes.spec is None, not a specification."""
    if notes is None or backend is not None or not x.is_cpu or not _eager.unforced():
        return None
    found = _eager.door.norm_eager(
        *(x, weight, bias, residual, centred, eps, weight_offset, rounding, torch.get_num_threads()), saves=True
    )
    if found is not None:
        notes.spec = None
    return found


def short_backward(
    dy: torch.Tensor | None,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    wants_dweight: bool,
    wants_dbias: bool,
    weight_offset: float = 0.0,
) -> tuple[Any, ...] | None:
    """`cpu_backward` behind a `short_forward`, or None."""
    return _eager.door.norm_bwd_eager(
        *(dy, dsum, x, weight, bias, mean, rstd, mean is not None, weight_offset),
        *(wants_dweight, wants_dbias, torch.get_num_threads()),
    )


class Rows(NamedTuple):
    """A tensor [..., cols] as rows: row (i, j, k) starts at i·stride[0] + j·stride[1] + k·stride[2] (in elements)."""

    sizes: tuple[int, int]  # of j and k
    strides: tuple[int, int, int]


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """x and its rows; x is copied only where its leading dimensions do not fold into three."""
    if x.is_contiguous():
        return x, Rows((1, 1), (x.shape[-1], 0, 0))
    folded: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    if len(folded) > 3:
        return rows_of(x.contiguous())
    padded = folded + [(1, 0)] * (3 - len(folded))
    return x, Rows((padded[1][0], padded[2][0]), (padded[0][1], padded[1][1], padded[2][1]))


def vector_gradient(dtype: torch.dtype | None, cols: int, rows: int, device: torch.device) -> torch.Tensor | None:
    """Room for dweight or dbias; without rows nothing writes it, and the sum over none is 0."""
    if dtype is None:
        return None
    return (torch.empty if rows else torch.zeros)(cols, dtype=dtype, device=device)


def unit_last(grad: torch.Tensor | None) -> torch.Tensor | None:
    """An incoming gradient as the kernels read it; the user does not choose its strides (`y.sum()` sends stride 0)."""
    return grad if grad is None or grad.stride(-1) == 1 or grad.shape[-1] <= 1 else grad.contiguous()
