"""Triton's interpreter as the tests need it: bfloat16 rounds to nearest even and multiplies as numbers.

As of Triton 3.9 the interpreter keeps bfloat16 as integers, truncates when it converts to it and multiplies the integers
in tl.dot. A GPU does neither. `mend` replaces those two operations and spares the interpreter work that only costs time;
everything else is its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of x, float32, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(x.shape)


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _wide(x: Any) -> np.ndarray:
    """The numbers of a floating tensor handle, as float32 where it is narrower."""
    if x.dtype.scalar == tl.bfloat16:
        return to_float32(x.data)
    return x.data.astype(np.float32) if x.data.dtype == np.float16 else x.data


@functools.cache
def mend() -> None:
    """Patch the interpreter in this process."""
    builder = interpreter.InterpreterBuilder
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def bfloat16_cast(src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or not (source.is_floating() and target.is_floating()):
            return None
        wide = _wide(src)
        data = to_bfloat16(wide) if target == tl.bfloat16 else wide.astype(interpreter._get_np_dtype(dst_type))
        return interpreter.TensorHandle(data, target)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        done = bfloat16_cast(src, dst_type)
        return cast(self, src, dst_type) if done is None else done

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        done = bfloat16_cast(src, dst_type)
        return convert(self, src, dst_type, rounding_mode) if done is None else done

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(_wide(a), _wide(b))  # of 16-bit numbers exact in float32
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    _patch_language_once()


def _patch_language_once() -> None:
    """The interpreter patches triton.language at every call of a device function, which takes longer than most of them.

    Once per launch and module suffices: nobody takes the patches back before the launch ends.
    """
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[frozenset[int]] = set()

    def patch_once(fn: Any) -> Any:
        languages = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
        if languages in done:
            return interpreter._LangPatchScope()
        done.add(languages)
        return patch(fn)

    def execute_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return execute(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, execute_afresh
