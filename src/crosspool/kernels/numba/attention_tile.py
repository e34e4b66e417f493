"""What attention needs beside plain products (amx_tile.py), in LLVM IR: value rows made into tiles of the
matrix unit, sums that stay in memory while more rows are added, and the weights of a block of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from crosspool.kernels.numba.amx_tile import SIDE, SUMS, VECTORS, WEIGHTS
from crosspool.kernels.numba.batch import BLOCK
from crosspool.kernels.numba.exp import (
    C2,
    C3,
    C4,
    C5,
    C6,
    C7,
    HIGHEST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    LOWEST,
    ONE,
    ROUNDS,
)
from crosspool.kernels.numba.intrinsics import I8, I16, I32, I64, VOID, declared

CHUNK = 32
"""Elements of a value row that become columns of two tiles."""

_HALVES = ir.VectorType(I16, CHUNK)
_QUARTER = 8
"""Halves of 128 bits, within which the processor interleaves two vectors in one operation."""


def _interleaved(half: int) -> Any:
    """A mask that takes, of each quarter of two vectors, the first or second four elements in turns."""
    begins = [quarter + _QUARTER // 2 * half for quarter in range(0, CHUNK, _QUARTER)]
    lanes = [n for begin in begins for i in range(begin, begin + _QUARTER // 2) for n in (i, CHUNK + i)]
    return ir.Constant(ir.VectorType(I32, CHUNK), lanes)


@intrinsic
def copy_chunks(typing: Any, source: Any, chunks: Any, target: Any) -> Any:
    """Copy ``chunks`` * CHUNK halves to cache lines at ``target``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, chunks, target = (
            argument if number == 1 else builder.inttoptr(argument, _HALVES.as_pointer())
            for number, argument in enumerate(arguments)
        )
        with cgutils.for_range(builder, chunks) as loop:
            value = builder.load(builder.gep(source, [loop.index]), align=1)
            builder.store(value, builder.gep(target, [loop.index]), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def pair_rows(typing: Any, first: Any, second: Any, chunks: Any, out: Any, tile_bytes: Any) -> Any:
    """Two rows of ``chunks`` * CHUNK halves as one row of each of ``2 * chunks`` tiles, ``tile_bytes`` apart:
    of each column the elements of both rows beside one another. Of a chunk's columns, those whose number has
    bit 2 clear are in the first of its tiles, the others in the second (see ``put_in_order``)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, chunks, out, tile_bytes = arguments
        with cgutils.for_range(builder, chunks) as loop:
            offset = builder.mul(loop.index, I64(2 * CHUNK))
            rows = [
                builder.load(builder.inttoptr(builder.add(row, offset), _HALVES.as_pointer()), align=1)
                for row in (first, second)
            ]
            place = builder.add(out, builder.mul(builder.shl(loop.index, I64(1)), tile_bytes))
            for half in range(2):
                value = builder.shuffle_vector(*rows, _interleaved(half))
                builder.store(value, builder.inttoptr(place, _HALVES.as_pointer()), align=64)
                place = builder.add(place, tile_bytes)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def add_tiles(
    typing: Any,
    left: Any,
    left_stride: Any,
    right: Any,
    right_bytes: Any,
    count: Any,
    sums: Any,
    sums_bytes: Any,
) -> Any:
    """Add to each of ``2 * count`` tiles of sums, ``sums_bytes`` apart, the product of the tile at ``left``,
    whose rows are ``left_stride`` bytes apart, with its own of the tiles at ``right``, ``right_bytes`` apart.
    After ``configure`` for the rows at ``left`` and SIDE vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, left_stride, right, right_bytes, count, sums, sums_bytes = arguments
        pointer = I8.as_pointer()
        load = declared(builder, "llvm.x86.tileloadd64", VOID, [I8, pointer, I64])
        store = declared(builder, "llvm.x86.tilestored64", VOID, [I8, pointer, I64])
        multiply = declared(builder, "llvm.x86.tdpbf16ps", VOID, [I8, I8, I8])

        def place(base: Any, index: Any, step: Any) -> Any:
            return builder.inttoptr(builder.add(base, builder.mul(index, step)), pointer)

        builder.call(load, [I8(WEIGHTS[0]), builder.inttoptr(left, pointer), left_stride])
        with cgutils.for_range(builder, count) as loop:
            numbers = [builder.add(builder.shl(loop.index, I64(1)), I64(i)) for i in range(2)]
            totals = [place(sums, number, sums_bytes) for number in numbers]
            for i, number in enumerate(numbers):
                builder.call(load, [I8(VECTORS[i]), place(right, number, right_bytes), I64(64)])
                builder.call(load, [I8(SUMS[i]), totals[i], I64(64)])
            for i in range(2):
                builder.call(multiply, [I8(SUMS[i]), I8(WEIGHTS[0]), I8(VECTORS[i])])
            for i in range(2):
                builder.call(store, [I8(SUMS[i]), totals[i], I64(64)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic
def exponentials(typing: Any, values: Any, count: Any, highest: Any) -> Any:
    """Replace each of the ``count`` float32 at an address, a multiple of SIDE, by e**(value - highest): the
    formula of ``exp``, with fused multiply-add."""
    kind, whole = ir.VectorType(ir.FloatType(), SIDE), ir.VectorType(I32, SIDE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fma = declared(builder, f"llvm.fma.v{SIDE}f32", kind, [kind] * 3)
        rounds, high, low = (ir.Constant(kind, [float(c)] * SIDE) for c in (ROUNDS, -LN2_HIGH, -LN2_LOW))
        log2, least, most = (ir.Constant(kind, [float(c)] * SIDE) for c in (LOG2_E, LOWEST, HIGHEST))
        zero = ir.Constant(kind, [0.0] * SIDE)
        terms = [ir.Constant(kind, [float(c)] * SIDE) for c in (C6, C5, C4, C3, C2, ONE, ONE)]
        bits, bias, one, shift = (
            ir.Constant(whole, [int(n)] * SIDE) for n in (ROUNDS.view(np.int32), 127, 1, 23)
        )
        begin = builder.inttoptr(arguments[0], kind.as_pointer())
        lanes = ir.Constant(whole, [0] * SIDE)
        peak = builder.insert_element(ir.Constant(kind, ir.Undefined), arguments[2], I32(0))
        peak = builder.shuffle_vector(peak, ir.Constant(kind, ir.Undefined), lanes)

        def power_of_two(n: Any) -> Any:
            return builder.bitcast(builder.shl(builder.add(n, bias), shift), kind)

        with cgutils.for_range(builder, builder.lshr(arguments[1], I64(4))) as loop:
            place = builder.gep(begin, [loop.index])
            x = builder.fsub(builder.load(place, align=4), peak)
            x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
            small = builder.fcmp_ordered("<", x, least)
            x = builder.select(small, least, x)
            shifted = builder.fadd(builder.fmul(x, log2), rounds)
            n = builder.fsub(shifted, rounds)
            r = builder.call(fma, [n, low, builder.call(fma, [n, high, x])])
            series = ir.Constant(kind, [float(C7)] * SIDE)
            for term in terms:
                series = builder.call(fma, [r, series, term])
            power = builder.sub(builder.bitcast(shifted, whole), bits)
            half = builder.ashr(power, one)
            series = builder.fmul(series, power_of_two(half))
            series = builder.fmul(series, power_of_two(builder.sub(power, half)))
            builder.store(builder.select(small, zero, series), place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def fold(typing: Any, values: Any, highest: Any) -> Any:
    """The sum of the BLOCK float32 at an address by halves, or, with a literal True, the highest of them."""
    if not isinstance(highest, types.BooleanLiteral):
        return None
    kind = ir.VectorType(ir.FloatType(), SIDE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base = builder.inttoptr(arguments[0], kind.as_pointer())

        def join(low: Any, high: Any) -> Any:
            if highest.literal_value:
                return builder.select(builder.fcmp_ordered(">", high, low), high, low)
            return builder.fadd(low, high)

        parts = [builder.load(builder.gep(base, [I64(i)]), align=4) for i in range(BLOCK // SIDE)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [join(*pair) for pair in zip(parts[:half], parts[half:], strict=True)]
        value, lanes = parts[0], SIDE
        while lanes > 1:
            lanes //= 2
            none = ir.Constant(value.type, ir.Undefined)
            halves = [
                builder.shuffle_vector(
                    value, none, ir.Constant(ir.VectorType(I32, lanes), list(range(begin, begin + lanes)))
                )
                for begin in (0, lanes)
            ]
            value = join(*halves)
        return builder.extract_element(value, I32(0))

    return types.float32(types.int64, highest), generate


@intrinsic
def put_in_order(typing: Any, first: Any, second: Any, out: Any) -> Any:
    """A row of sums of a chunk's two tiles, as ``pair_rows`` split them, to float32 [CHUNK] at ``out``."""
    kind = ir.VectorType(ir.FloatType(), SIDE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, out = arguments
        rows = [builder.load(builder.inttoptr(row, kind.as_pointer()), align=4) for row in (first, second)]
        step = _QUARTER // 2
        columns = [
            column // _QUARTER * step + column % step + SIDE * (column // step % 2) for column in range(CHUNK)
        ]
        for part in range(2):
            lanes = ir.Constant(ir.VectorType(I32, SIDE), columns[SIDE * part : SIDE * (part + 1)])
            place = builder.inttoptr(builder.add(out, I64(4 * SIDE * part)), kind.as_pointer())
            builder.store(builder.shuffle_vector(*rows, lanes), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
