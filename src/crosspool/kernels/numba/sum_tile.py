"""The other innermost loop of attention: sums of value rows, each weighted for several query heads.

A tile keeps the sums of a few heads over a strip of the rows' elements in registers while all rows pass by.
Each sum takes its rows one after another by fused multiply-add, whatever the size of the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.dot_tile import FLOATS, LANES, load, load_wide
from crosspool.kernels.numba.elements import BFLOAT16, FLOAT16, FLOAT32, element_bytes
from crosspool.kernels.numba.intrinsics import F32, I8, I32, I64, VOID, declared

STRIP = 4
HEADS = 6 if LANES == 16 else 2
"""The largest tile: HEADS x STRIP vector registers of sums, and one for each operand."""


def make_sum_tile(dtype: int, heads: int, strip: int) -> Callable[..., None]:
    """tile(values, stride, count, weights, weight_stride, out, out_stride, rest), for compiled code.

    ``values`` is the address of the strip's first element in the first of ``count`` rows, ``stride`` bytes
    apart. Head h's weight of row r is the float32 at ``weights + h * weight_stride + 4 * r``; its sums are
    added to the float32 from ``out + h * out_stride`` on. The strip is ``strip`` * LANES elements; a strip of
    1 is ``rest`` elements, up to LANES.
    """

    @intrinsic
    def tile(
        typing: Any,
        values: Any,
        stride: Any,
        count: Any,
        weights: Any,
        weight_stride: Any,
        out: Any,
        out_stride: Any,
        rest: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, stride, count, weights, weight_stride, out, out_stride, rest = arguments
            rest = rest if strip == 1 else None
            multiply_add = declared(builder, f"llvm.fma.v{LANES}f32", FLOATS, [FLOATS] * 3)
            rows = [
                _place(builder, builder.add(weights, builder.mul(weight_stride, I64(h))))
                for h in range(heads)
            ]
            outs = [_place(builder, builder.add(out, builder.mul(out_stride, I64(h)))) for h in range(heads)]
            parts = [I64(part * LANES) for part in range(strip)]
            sums = [
                [
                    cgutils.alloca_once_value(builder, load(builder, place, part, F32, 4, LANES, rest))
                    for part in parts
                ]
                for place in outs
            ]
            with cgutils.for_range(builder, count) as loop:
                row = _place(builder, builder.add(values, builder.mul(stride, loop.index)))
                wide = [load_wide(builder, row, part, dtype, rest) for part in parts]
                for own, place in zip(sums, rows, strict=True):
                    weight = _spread(builder, builder.load(_element(builder, place, loop.index), align=4))
                    for total, value in zip(own, wide, strict=True):
                        product = builder.call(multiply_add, [weight, value, builder.load(total)])
                        builder.store(product, total)
            for own, place in zip(sums, outs, strict=True):
                for total, part in zip(own, parts, strict=True):
                    _store(builder, builder.load(total), _element(builder, place, part), rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile  # type: ignore[no-any-return]


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I8.as_pointer())


def _element(builder: Any, place: Any, index: Any) -> Any:
    """A pointer to float32 number ``index`` from ``place`` on."""
    return builder.gep(builder.bitcast(place, F32.as_pointer()), [index])


def _spread(builder: Any, value: Any, kind: Any = FLOATS) -> Any:
    """A vector with the value in every lane."""
    none = ir.Constant(kind, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(builder.insert_element(none, value, I32(0)), none, lanes)


def _store(builder: Any, value: Any, place: Any, rest: Any) -> None:
    """Store all lanes, or the first ``rest``."""
    where = builder.bitcast(place, FLOATS.as_pointer())
    if rest is None:
        builder.store(value, where, align=4)
        return
    lanes = ir.VectorType(I32, LANES)
    below = _spread(builder, builder.trunc(rest, I32), lanes)
    mask = builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), below)
    name = f"llvm.masked.store.v{LANES}f32.p0"
    function = declared(builder, name, VOID, [FLOATS, FLOATS.as_pointer(), I32, mask.type])
    builder.call(function, [value, where, I32(4), mask])


def _make_sums(dtype: int):
    """sums(values, stride, count, width, weights, weight_stride, heads, out, out_stride), for one type."""
    whole_many, whole_two, whole_one = (make_sum_tile(dtype, heads, STRIP) for heads in (HEADS, 2, 1))
    rest_many, rest_two, rest_one = (make_sum_tile(dtype, heads, 1) for heads in (HEADS, 2, 1))

    @kernel
    def sums(values, stride, count, width, weights, weight_stride, heads, out, out_stride):
        column = 0
        while column < width:
            place, target = values + column * element_bytes(dtype), out + 4 * column
            whole = column + STRIP * LANES <= width
            rest = min(LANES, width - column)
            head = 0
            while head < heads:
                w, o = weights + head * weight_stride, target + head * out_stride
                if head + HEADS <= heads:
                    if whole:
                        whole_many(place, stride, count, w, weight_stride, o, out_stride, 0)
                    else:
                        rest_many(place, stride, count, w, weight_stride, o, out_stride, rest)
                    head += HEADS
                elif head + 2 <= heads:
                    if whole:
                        whole_two(place, stride, count, w, weight_stride, o, out_stride, 0)
                    else:
                        rest_two(place, stride, count, w, weight_stride, o, out_stride, rest)
                    head += 2
                else:
                    if whole:
                        whole_one(place, stride, count, w, weight_stride, o, out_stride, 0)
                    else:
                        rest_one(place, stride, count, w, weight_stride, o, out_stride, rest)
                    head += 1
            column += STRIP * LANES if whole else LANES

    return sums


_sums_float32 = _make_sums(FLOAT32)
_sums_bfloat16 = _make_sums(BFLOAT16)
_sums_float16 = _make_sums(FLOAT16)


@kernel
def add_weighted(values, stride, count, width, dtype, weights, weight_stride, heads, out, out_stride):
    """Add ``count`` rows of ``width`` elements of ``dtype``, weighted for each of ``heads`` heads, to sums.

    Row r is at ``values + r * stride``; the addresses of weights and sums are as in ``make_sum_tile``. A
    sum's value depends on the rows, their order, its weights and what it was.
    """
    if dtype == BFLOAT16:
        _sums_bfloat16(values, stride, count, width, weights, weight_stride, heads, out, out_stride)
    elif dtype == FLOAT16:
        _sums_float16(values, stride, count, width, weights, weight_stride, heads, out, out_stride)
    else:
        _sums_float32(values, stride, count, width, weights, weight_stride, heads, out, out_stride)
