"""The few validation sentences that every spec uses: `<op>: <argument> must be <expectation>, got <fact>`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

_INFINITY = float("inf")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expectation: str, fact: Any) -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {expectation}, got {fact}")


def is_tensor(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        fail(op, argument, "a torch.Tensor", type(value).__name__)
    if value.is_nested:
        fail(op, argument, "a plain tensor (fastattn.nn has modules for nested ones)", "a nested tensor")


def floating(op: str, argument: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATING:
        fail(op, argument, "float32, bfloat16, float16 or float64", tensor.dtype)


def same_device(op: str, argument: str, tensor: torch.Tensor, of: str, device: torch.device) -> None:
    if tensor.device != device:
        fail(op, argument, f"on the device of {of} ({device})", tensor.device)


def same_dtype(op: str, argument: str, tensor: torch.Tensor, of: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        fail(op, argument, f"of the dtype of {of} ({dtype})", tensor.dtype)


def shape(op: str, argument: str, tensor: torch.Tensor, expected: tuple[Any, ...], where: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        fail(op, argument, f"of shape {where} {tuple(expected)}", tuple(tensor.shape))


def unit_last_stride(op: str, argument: str, tensor: torch.Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        fail(op, argument, "a tensor with unit last stride (call .contiguous())", f"strides {tuple(tensor.stride())}")


def number(op: str, argument: str, value: Any, *, low: float | None = None, high: float | None = None) -> None:
    """A finite float in (low, high); None leaves a side open."""
    if type(value) is float and low is None and high is None and -_INFINITY < value < _INFINITY:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        fail(op, argument, "a number", type(value).__name__)
    if value != value or value in (_INFINITY, -_INFINITY):
        fail(op, argument, "finite", value)
    if low is not None and not value > low:
        fail(op, argument, f"greater than {low}", value)
    if high is not None and not value < high:
        fail(op, argument, f"less than {high}", value)
