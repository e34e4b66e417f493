"""The innermost loop of every product: dot products of a few weight rows with a few vectors, in LLVM IR.

Both are read along their rows as checkpoints store them, [out, in], so nothing is packed or copied first.
Each (row, vector) pair has one vector register of partial sums, filled in steps of STEP elements and added up
by halves at the end. That order is the same whatever the size of the tile, which is why a row's result never
depends on how many rows and vectors are computed beside it.

bfloat16 by bfloat16 uses AVX-512 BF16 where the CPU has it: products of pairs, accumulated in float32. All
other types are widened to float32 and use fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from crosspool.kernels.numba.compile import cpu_features
from crosspool.kernels.numba.elements import BFLOAT16, FLOAT16, FLOAT32, INT8
from crosspool.kernels.numba.intrinsics import F32, I8, I16, I32, I64, VOID, declared

STEP = 32
LANES = 16 if "avx512f" in cpu_features() else 8
ROWS = 8 if LANES == 16 else 4
VECTORS = 3
"""The largest tile: ROWS x VECTORS sums and one register for each operand fit the register file."""

_ELEMENT = {FLOAT32: F32, BFLOAT16: I16, FLOAT16: I16, INT8: I8}
_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, INT8: 1}
FLOATS = ir.VectorType(F32, LANES)


class _BfloatType(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BfloatType._create_instance()
_BFLOATS = ir.VectorType(_BfloatType(), STEP)


def make_tile(
    weight_dtype: int, vector_dtype: int, rows: int, vectors: int, *, fetch_ahead: bool
) -> Callable[..., None]:
    """A function for compiled code: tile(weights, stride, length, x0, x1, x2, out0, out1, out2).

    ``weights`` is the address of the first of ``rows`` rows, ``stride`` bytes apart; ``x0`` .. are addresses
    of vectors of ``length`` elements (only the first ``vectors`` count). The float32 sums of vector v with
    all rows go to ``out_v`` [rows]. Scales of int8 rows are not applied.
    ``fetch_ahead``: the ``rows`` rows that follow are asked for on the way.
    """
    pairs = (
        weight_dtype == BFLOAT16
        and vector_dtype == BFLOAT16
        and LANES == 16
        and "avx512bf16" in cpu_features()
    )
    multiply = _PairedStep() if pairs else _WideStep(weight_dtype, vector_dtype)

    @intrinsic
    def tile(
        typing: Any,
        weights: Any,
        stride: Any,
        length: Any,
        x0: Any,
        x1: Any,
        x2: Any,
        o0: Any,
        o1: Any,
        o2: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, stride, length = arguments[:3]
            places = [_place(builder, address) for address in arguments[3 : 3 + vectors]]
            outs = arguments[6 : 6 + vectors]
            offsets = [builder.mul(stride, I64(row)) for row in range(rows)]
            row_places = [_place(builder, builder.add(weights, offset)) for offset in offsets]
            ahead = builder.mul(stride, I64(rows)) if fetch_ahead else None
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(rows)]
            whole = builder.lshr(length, I64(5))
            with cgutils.for_range(builder, whole) as loop:
                at = builder.shl(loop.index, I64(5))
                multiply(builder, row_places, places, at, None, sums, ahead)
            rest = builder.and_(length, I64(STEP - 1))
            with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
                at = builder.shl(whole, I64(5))
                multiply(builder, row_places, places, at, rest, sums, None)
            for vector, out in enumerate(outs):
                place = builder.inttoptr(out, F32.as_pointer())
                for row in range(rows):
                    total = _add_up(builder, builder.load(sums[row][vector]))
                    builder.store(total, builder.gep(place, [I64(row)]), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return tile  # type: ignore[no-any-return]


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I8.as_pointer())


def _add_up(builder: Any, value: Any) -> Any:
    """The sum of a vector's lanes, by halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        kind, none = ir.VectorType(I32, lanes), ir.Constant(value.type, ir.Undefined)
        low = builder.shuffle_vector(value, none, ir.Constant(kind, list(range(lanes))))
        high = builder.shuffle_vector(value, none, ir.Constant(kind, list(range(lanes, 2 * lanes))))
        value = builder.fadd(low, high)
    return builder.extract_element(value, I32(0))


def load(builder: Any, place: Any, at: Any, element: Any, size: int, count: int, rest: Any) -> Any:
    """``count`` elements from number ``at`` on; with ``rest`` only so many are read, and zeros follow."""
    kind = ir.VectorType(element, count)
    where = builder.bitcast(builder.gep(place, [builder.mul(at, I64(size))]), kind.as_pointer())
    if rest is None:
        return builder.load(where, align=size)
    lanes = ir.VectorType(I32, count)
    below = builder.insert_element(ir.Constant(lanes, ir.Undefined), builder.trunc(rest, I32), I32(0))
    below = builder.shuffle_vector(below, ir.Constant(lanes, ir.Undefined), ir.Constant(lanes, [0] * count))
    mask = builder.icmp_signed("<", ir.Constant(lanes, list(range(count))), below)
    name = f"llvm.masked.load.v{count}{'f32' if element is F32 else f'i{8 * size}'}.p0"
    function = declared(builder, name, kind, [kind.as_pointer(), I32, mask.type, kind])
    return builder.call(function, [where, I32(size), mask, ir.Constant(kind, None)])


def load_wide(builder: Any, place: Any, at: Any, dtype: int, rest: Any) -> Any:
    """LANES elements from number ``at`` on as float32, ``rest`` as in ``load``."""
    stored = load(builder, place, at, _ELEMENT[dtype], _BYTES[dtype], LANES, rest)
    if dtype == FLOAT32:
        return stored
    if dtype == FLOAT16:
        halves = builder.bitcast(stored, ir.VectorType(ir.HalfType(), LANES))
        return builder.fpext(halves, FLOATS)
    wide = ir.VectorType(I32, LANES)
    if dtype == INT8:
        return builder.sitofp(builder.sext(stored, wide), FLOATS)
    shifted = builder.shl(builder.zext(stored, wide), ir.Constant(wide, [16] * LANES))
    return builder.bitcast(shifted, FLOATS)


def _prefetch(builder: Any, place: Any, at: Any, size: int, ahead: Any) -> None:
    """Ask for the same elements of the rows that come next, one request a cache line."""
    function = declared(builder, "llvm.prefetch.p0", VOID, [I8.as_pointer(), I32, I32, I32])
    begin = builder.add(builder.mul(at, I64(size)), ahead)
    for line in range(0, STEP * size, 64):
        builder.call(function, [builder.gep(place, [builder.add(begin, I64(line))]), I32(0), I32(3), I32(1)])


class _PairedStep:
    """STEP elements of bfloat16 by bfloat16."""

    def __call__(
        self, builder: Any, rows: Any, vectors: Any, at: Any, rest: Any, sums: Any, ahead: Any
    ) -> None:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        multiply_add = declared(builder, name, FLOATS, [FLOATS, _BFLOATS, _BFLOATS])

        def paired(place: Any) -> Any:
            return builder.bitcast(load(builder, place, at, I16, 2, STEP, rest), _BFLOATS)

        values = [paired(place) for place in vectors]
        for row, place in enumerate(rows):
            if ahead is not None:
                _prefetch(builder, place, at, 2, ahead)
            weight = paired(place)
            for vector, value in enumerate(values):
                total = sums[row][vector]
                builder.store(builder.call(multiply_add, [builder.load(total), weight, value]), total)


class _WideStep:
    """STEP elements of any two types, widened to float32."""

    def __init__(self, weight_dtype: int, vector_dtype: int) -> None:
        self._weight = weight_dtype
        self._vector = vector_dtype

    def __call__(
        self, builder: Any, rows: Any, vectors: Any, at: Any, rest: Any, sums: Any, ahead: Any
    ) -> None:
        multiply_add = declared(builder, f"llvm.fma.v{LANES}f32", FLOATS, [FLOATS] * 3)
        if ahead is not None:
            for place in rows:
                _prefetch(builder, place, at, _BYTES[self._weight], ahead)
        for part in range(0, STEP, LANES):
            here = builder.add(at, I64(part))
            left = None if rest is None else builder.sub(rest, I64(part))
            values = [load_wide(builder, place, here, self._vector, left) for place in vectors]
            for row, place in enumerate(rows):
                weight = load_wide(builder, place, here, self._weight, left)
                for vector, value in enumerate(values):
                    total = sums[row][vector]
                    builder.store(builder.call(multiply_add, [weight, value, builder.load(total)]), total)
