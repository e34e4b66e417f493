"""Triton's interpreter, made to compute what a GPU computes. Import this before any kernel.

The interpreter keeps bfloat16 and float8 as unsigned integers and computes with those: products come out as
garbage, and conversions are not rounded as a GPU rounds them. Here sums of products are rounded to float32
in chains, as matrix units do; conversions round to nearest, ties to even; other arithmetic with them is
refused, for kernels must convert first. What a masked load without ``other`` gives is not a number: on a GPU
it is anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

INTERPRETED = bool(knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
"""Where tensors of kernel tests are."""

CHAINED = 16
"""Products that a matrix unit sums before it rounds."""

_NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_TO_NEAREST_EVEN = interpreter._ir.ROUNDING_MODE.RTNE

_plain_binary, _plain_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
_plain_cast, _plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_plain_load, _plain_fma = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_fma
_plain_atomic, _plain_launch = InterpreterBuilder.create_atomic_rmw, GridExecutor.__call__


def _install() -> None:
    builder: Any = InterpreterBuilder
    builder.binary_op, builder.unary_op = _refusing(_binary), _refusing(_plain_unary)
    builder.create_fma, builder.create_atomic_rmw = _refusing(_plain_fma), _refusing(_plain_atomic)
    builder.cast_impl, builder.create_fp_to_fp = _cast, _round
    builder.create_dot, builder.create_masked_load = _dot, _load
    for ops in (ReduceOps, ScanOps):
        ops.apply_impl = _refusing_tensors(ops.apply_impl)  # type: ignore[method-assign]
    GridExecutor.__call__ = _launch  # type: ignore[method-assign]


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    """What a comparison gives is of one bit, and stays so when a scalar of it becomes a block."""
    result = _plain_binary(self, left, right, operation)
    return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result


def _widened(handle: Any) -> Any:
    """The float32 of each element, exactly; other types as they are."""
    narrow = _NARROW.get(handle.dtype.scalar)
    if narrow is None:
        return handle
    data = torch.from_numpy(np.ascontiguousarray(handle.data)).view(narrow).float().numpy()
    return TensorHandle(data, tl.float32)


def _cast(self: Any, source: Any, target: Any) -> Any:
    narrow = _NARROW.get(target.scalar)
    source = _widened(source)
    if narrow is None:
        return _plain_cast(self, source, target)
    wide = torch.from_numpy(np.ascontiguousarray(_plain_cast(self, source, tl.float32).data))
    if narrow is not torch.bfloat16:
        wide = wide.clamp(torch.finfo(narrow).min, torch.finfo(narrow).max)
    bits = wide.to(narrow).view(torch.uint16 if narrow is torch.bfloat16 else torch.uint8)
    return TensorHandle(bits.numpy(), target.scalar)


def _round(self: Any, source: Any, target: Any, mode: Any) -> Any:
    narrows = target.scalar.primitive_bitwidth < source.dtype.scalar.primitive_bitwidth
    if narrows and mode is not None and mode != _TO_NEAREST_EVEN:
        raise NotImplementedError(f"rounding to {target.scalar} other than to nearest even")
    return _cast(self, source, target)


def _dot(self: Any, left: Any, right: Any, addend: Any, *rest: Any) -> Any:
    """As matrix units do: chains of sums of a few products each, so that bits depend on the order of what is
    summed alone, and not, as with a CPU's library, on the size of the tile and the place in it."""
    left, right = _widened(left), _widened(right)
    if addend.dtype.scalar != tl.float32:
        return _plain_dot(self, left, right, addend, *rest)
    total, rows, columns = addend.data, left.data.astype(np.float64), right.data.astype(np.float64)
    for begin in range(0, rows.shape[-1], CHAINED):
        end = begin + CHAINED
        total = (total + rows[..., begin:end] @ columns[..., begin:end, :]).astype(np.float32)
    return TensorHandle(total, tl.float32)


def _load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
    if other is None and not mask.data.all():
        element = pointers.get_element_ty()
        other = TensorHandle(_nothing(pointers.data.shape, interpreter._get_np_dtype(element)), element)
    return _plain_load(self, pointers, mask, other, *rest)


def _nothing(shape: tuple[int, ...], dtype: Any) -> Any:
    """No number in any floating type, and far out of range in integer ones."""
    if np.issubdtype(dtype, np.floating):
        return np.full(shape, np.nan, dtype)
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    return np.full(shape, np.iinfo(dtype).max, dtype)


def _refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: Any, *arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, TensorHandle):
                _refuse(argument.dtype.scalar)
        return operation(self, *arguments)

    return guarded


def _refusing_tensors(operation: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: Any, tensors: Any) -> Any:
        for tensor in tensors:
            _refuse(tensor.dtype.scalar)
        return operation(self, tensors)

    return guarded


def _refuse(element: Any) -> None:
    if not element.is_ptr() and element in _NARROW:
        raise NotImplementedError(f"arithmetic with {element}: convert to float32 first")


def _launch(self: Any, *arguments: Any, **options: Any) -> None:
    """As on a GPU, an infinity or what is not a number raises nothing."""
    with np.errstate(all="ignore"):
        _plain_launch(self, *arguments, **options)


if INTERPRETED:
    _install()
