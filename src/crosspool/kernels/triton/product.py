"""Products of weights with tokens: the loop of every kernel that reads weights. How it is cut: tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.table import aligned, layer_weights
from crosspool.kernels.triton.tiles import SCALED

PLAIN, FLOAT8, FLOAT8_BITS = range(3)
"""How weights are stored: in model dtype, or in e4m3 which the chip converts, or which the kernel does."""

_PLAIN: tl.constexpr = tl.constexpr(PLAIN)
_FLOAT8: tl.constexpr = tl.constexpr(FLOAT8)
_SCALED: tl.constexpr = tl.constexpr(SCALED)


@triton.jit
def weights_at(address, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer to weights, whose model has DTYPE, from an address."""
    if STORED == _PLAIN:
        pointer = aligned(address, DTYPE)
    elif STORED == _FLOAT8:
        pointer = aligned(address, tl.float8e4nv)
    else:
        pointer = aligned(address, tl.uint8)
    return pointer


@triton.jit
def scales_at(lane, layer, WORD: tl.constexpr, STORED: tl.constexpr):
    """The scales at a word of a layer; of weights that have none, a pointer that is not read."""
    if STORED == _PLAIN:
        pointer = lane.to(tl.pointer_type(tl.float32), bitcast=True)
    else:
        pointer = layer_weights(lane, layer, WORD, tl.float32)
    return pointer


@triton.jit
def expert_at(matrices, expert, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a matrix [ROWS, COLUMNS] of several begins."""
    return matrices + expert.to(tl.int64) * (ROWS * COLUMNS)


@triton.jit
def rows_at(matrix, rows, COLUMNS: tl.constexpr):
    """Pointers to the beginnings of some rows of a matrix [.., COLUMNS]."""
    return matrix + rows.to(tl.int64) * COLUMNS


@triton.jit
def multiply(
    weights,
    scales,
    x,
    live,
    begin,
    INPUTS: tl.constexpr,
    LENGTH: tl.constexpr,
    STORED: tl.constexpr,
    STEP: tl.constexpr,
):
    """float32 [outputs, tokens]: inputs ``begin`` to at most ``begin + LENGTH - 1`` of W x^T, in order.

    ``weights`` points to rows of W, ``x`` to rows in model dtype, of which those that are not ``live`` count
    as 0; a row is INPUTS long. If weights have scales, ``scales`` points to those of each row, one for every
    SCALED columns; then STEP is SCALED, and each step's sum is scaled before it is added.
    """
    columns = begin + tl.arange(0, STEP)
    weight = weights[:, None] + columns[None, :]
    token = x[:, None] + columns[None, :]
    total = tl.zeros((weights.shape[0], x.shape[0]), tl.float32)
    if STORED != _PLAIN:
        scale = tl.load(scales + begin // _SCALED)
    for at in range(begin, tl.minimum(begin + LENGTH, INPUTS), STEP):
        if INPUTS % STEP == 0:
            w = tl.load(weight)
            t = tl.load(token, mask=live[:, None], other=0.0)
        else:
            inside = tl.arange(0, STEP)[None, :] < INPUTS - at
            w = tl.load(weight, mask=inside, other=0.0)
            t = tl.load(token, mask=live[:, None] & inside, other=0.0)
        if STORED == _PLAIN:
            total = tl.dot(w, t.T, total, input_precision="ieee")
        else:
            # The next step's scales are asked for before this step's product is waited for.
            upcoming = tl.load(scales + tl.minimum(at + STEP, INPUTS - 1) // _SCALED)
            product = tl.dot(_widen(w, STORED, x.dtype.scalar.element_ty), t.T, input_precision="ieee")
            total += product * scale[:, None]
            scale = upcoming
        weight += STEP
        token += STEP
    return total


@triton.jit
def _widen(values, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers in e4m3 in model dtype, which has all of them."""
    if STORED == _FLOAT8:
        wide = values.to(DTYPE)
    else:
        # Exponent and fraction where float32 has them give 2^-120 times the number, subnormal or not.
        bits = values.to(tl.uint32)
        size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        signed = size.to(tl.uint32, bitcast=True) | (bits & 0x80) << 24
        wide = signed.to(tl.float32, bitcast=True).to(DTYPE)
    return wide


@triton.jit
def multiply_all(
    weights,
    scales,
    x,
    live,
    INPUTS: tl.constexpr,
    LENGTH: tl.constexpr,
    STORED: tl.constexpr,
    STEP: tl.constexpr,
    begin=0,
):
    """All inputs, as ``multiply`` has them: the sums of their parts, added in order.

    ``begin`` is 0. A kernel of one product says so; one of several reads it from its arguments, for where a
    compiler knows how long loops are it unrolls them, and then a kernel runs out of registers.
    """
    total = tl.zeros((weights.shape[0], x.shape[0]), tl.float32)
    for at in range(begin, INPUTS, LENGTH):
        total += multiply(weights, scales, x, live, at, INPUTS, LENGTH, STORED, STEP)
    return total


@triton.jit
def is_last(arrivals, EXPECTED: tl.constexpr):
    """Whether this program is the last of EXPECTED to come here: then it sees what the others have stored.

    ``arrivals`` points to a zero, which the last program restores.
    """
    tl.debug_barrier()  # All of this program's threads have stored before one of them says so.
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == EXPECTED - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def sum_parts(parts, mask, stride, PARTS: tl.constexpr):
    """Sums of parts of a product, ``stride`` elements after each other, added in order. Other programs have
    written them, so they are read past the multiprocessor's own cache."""
    total = tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    for _ in range(1, PARTS):
        parts += stride
        total += tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total
