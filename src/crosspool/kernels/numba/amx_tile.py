"""Products of bfloat16 tiles by the matrix unit of x86 processors (Intel's Architecture Instruction Set
Extensions, chapter on AMX), in LLVM IR.

A tile is 16 rows of 64 bytes. Weights are read as checkpoints store them, 16 rows of 32 elements a tile.
Vectors come packed: of each pair of elements the values of all vectors beside one another. The sums of a
(row, vector) pair are those of its own elements in their order, whatever else is in the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from crosspool.kernels.numba.intrinsics import I8, I16, I32, I64, VOID, declared

SIDE = 16
"""Rows of a tile, and vectors of one."""

TILE_BYTES = 1024
DEPTH = 32
"""Elements of a row, and of a vector, in one tile."""

SUMS, WEIGHTS, VECTORS = (0, 1, 2, 3), (4, 5), (6, 7)
"""The eight registers: 2 x 2 tiles of sums, their rows, their columns."""

LANES = ir.VectorType(I32, SIDE)


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I8.as_pointer())


@intrinsic
def configure(typing: Any, rows: Any, vectors: Any) -> Any:
    """Tell the unit the shapes of the calls that follow: ``rows`` and ``vectors`` of a tile, up to SIDE."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, vectors = arguments
        config = cgutils.alloca_once(builder, ir.ArrayType(I8, 64))
        base = builder.bitcast(config, I8.as_pointer())
        builder.store(ir.Constant(ir.ArrayType(I8, 64), [1] + [0] * 63), config)
        width = builder.trunc(builder.mul(vectors, I64(4)), I16)
        count = builder.trunc(rows, I8)
        for register in range(8):
            bytes_of_row = I16(64) if register in WEIGHTS else width
            rows_of_tile = I8(SIDE) if register in VECTORS else count
            place = builder.bitcast(builder.gep(base, [I64(16 + 2 * register)]), I16.as_pointer())
            builder.store(bytes_of_row, place, align=1)
            builder.store(rows_of_tile, builder.gep(base, [I64(48 + register)]), align=1)
        builder.call(declared(builder, "llvm.x86.ldtilecfg", VOID, [I8.as_pointer()]), [base])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def release(typing: Any) -> Any:
    """Give the unit back: a thread that holds it is dearer to switch."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(declared(builder, "llvm.x86.tilerelease", VOID, []), [])
        return context.get_dummy_value()

    return types.void(), generate


def make_products(row_tiles: int, vector_tiles: int) -> Callable[..., None]:
    """products(weights, stride, depth, rest, x, x_stride, x_tile, out), for compiled code, after
    ``configure``.

    ``weights`` is the address of the first of ``row_tiles`` * SIDE rows, ``stride`` bytes apart; ``depth`` is
    how many whole tiles a row has. ``rest`` is the address of one more tile a row tile, 0 if there is none.
    Packed vectors are at ``x``: ``x_stride`` bytes a pair of elements, ``x_tile`` bytes from one tile of
    vectors to the next. The float32 sums go to ``out``: [row tile][vector tile][SIDE][SIDE].
    """
    numbers = [(row, vector) for row in range(row_tiles) for vector in range(vector_tiles)]

    @intrinsic
    def products(
        typing: Any,
        weights: Any,
        stride: Any,
        depth: Any,
        rest: Any,
        x: Any,
        x_stride: Any,
        x_tile: Any,
        out: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, stride, depth, rest, x, x_stride, x_tile, out = arguments
            pointer = I8.as_pointer()
            load = declared(builder, "llvm.x86.tileloadd64", VOID, [I8, pointer, I64])
            store = declared(builder, "llvm.x86.tilestored64", VOID, [I8, pointer, I64])
            multiply = declared(builder, "llvm.x86.tdpbf16ps", VOID, [I8, I8, I8])
            zero = declared(builder, "llvm.x86.tilezero", VOID, [I8])
            row_places = [builder.add(weights, builder.mul(stride, I64(SIDE * t))) for t in range(row_tiles)]
            vector_places = [builder.add(x, builder.mul(x_tile, I64(t))) for t in range(vector_tiles)]
            step = builder.mul(x_stride, I64(SIDE))

            def add_products(places: list[Any], distance: Any, offset: Any) -> None:
                for vector, place in enumerate(vector_places):
                    where = _place(builder, builder.add(place, offset))
                    builder.call(load, [I8(VECTORS[vector]), where, x_stride])
                for row, place in enumerate(places):
                    builder.call(load, [I8(WEIGHTS[row]), _place(builder, place), distance])
                    for vector in range(vector_tiles):
                        total = SUMS[row * vector_tiles + vector]
                        builder.call(multiply, [I8(total), I8(WEIGHTS[row]), I8(VECTORS[vector])])

            for row, vector in numbers:
                builder.call(zero, [I8(SUMS[row * vector_tiles + vector])])
            with cgutils.for_range(builder, depth) as loop:
                at = builder.shl(loop.index, I64(6))
                places = [builder.add(place, at) for place in row_places]
                add_products(places, stride, builder.mul(step, loop.index))
            with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
                places = [builder.add(rest, I64(TILE_BYTES * t)) for t in range(row_tiles)]
                add_products(places, I64(64), builder.mul(step, depth))
            for row, vector in numbers:
                number = row * vector_tiles + vector
                where = _place(builder, builder.add(out, I64(TILE_BYTES * number)))
                builder.call(store, [I8(SUMS[number]), where, I64(64)])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return products  # type: ignore[no-any-return]


@intrinsic
def transpose(typing: Any, sources: Any, offset: Any, out: Any, out_stride: Any) -> Any:
    """Transpose 16 rows of 16 words of 32 bits: row r is at address ``sources[r] + offset`` (sources: the
    address of 16 int64), column c goes to ``out + c * out_stride``.

    Four rounds in each of which row i is interleaved with row i + 8.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sources, offset, out, out_stride = arguments
        pointers = builder.inttoptr(sources, I64.as_pointer())
        rows = []
        for row in range(SIDE):
            address = builder.add(builder.load(builder.gep(pointers, [I64(row)])), offset)
            rows.append(builder.load(builder.inttoptr(address, LANES.as_pointer()), align=1))
        half = SIDE // 2
        low = ir.Constant(LANES, [lane for i in range(half) for lane in (i, SIDE + i)])
        high = ir.Constant(LANES, [lane for i in range(half, SIDE) for lane in (i, SIDE + i)])
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[i], rows[i + half], mask)
                for i in range(half)
                for mask in (low, high)
            ]
        for column, value in enumerate(rows):
            address = builder.add(out, builder.mul(out_stride, I64(column)))
            builder.store(value, builder.inttoptr(address, LANES.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def make_room(size: int) -> Callable[[], int]:
    """room(), for compiled code: the address of ``size`` bytes of the caller's stack, on a cache line."""

    @intrinsic
    def room(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = cgutils.alloca_once(builder, I8, size=size + 64)
            address = builder.add(builder.ptrtoint(place, I64), I64(63))
            return builder.and_(address, I64(-64))

        return types.int64(), generate

    return room  # type: ignore[no-any-return]
