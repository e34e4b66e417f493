"""The first half of an FFN: gate and up of all pairs, and of all tokens for the common FFN, in one launch.

A tile of weights is half gates and half ups of the same columns, so that a program has both at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton.ffn_plan import FfnPlan, FfnRoom
from crosspool.kernels.triton.gate import ACTIVATIONS, gated
from crosspool.kernels.triton.pairs import BLOCK_FIELDS
from crosspool.kernels.triton.product import expert_at, multiply, rows_at, scales_at, weights_at
from crosspool.kernels.triton.table import layer_word
from crosspool.kernels.triton.tiles import SCALED
from crosspool.kernels.triton.words import (
    GATE_UP,
    GATE_UP_SCALES,
    QUERIES,
    SHARED_GATE_UP,
    SHARED_GATE_UP_SCALES,
)

_QUERIES: tl.constexpr = tl.constexpr(QUERIES)
_GATE_UP: tl.constexpr = tl.constexpr(GATE_UP)
_GATE_UP_SCALES: tl.constexpr = tl.constexpr(GATE_UP_SCALES)
_SCALED: tl.constexpr = tl.constexpr(SCALED)
_FIELDS: tl.constexpr = tl.constexpr(BLOCK_FIELDS)


def expand(plan: FfnPlan, lane: Tensor, layer: int, x: Tensor, room: FfnRoom) -> None:
    """``x`` [T, H] in model dtype, and the room's sorted pairs, to its activations."""
    tile, half = plan.tile, plan.tile.outputs // 2
    common = plan.token_tiles * triton.cdiv(plan.common_width, half)
    _expand[(common + plan.blocks * triton.cdiv(plan.width, half),)](
        lane,
        layer,
        x,
        *room.pairs,
        room.activations,
        room.common_activations,
        plan.token_tiles,
        HIDDEN=plan.geometry.hidden,
        TOP_K=plan.top_k,
        WIDTH=plan.width,
        COMMON_WIDTH=plan.common_width,
        COMMON=SHARED_GATE_UP if plan.top_k else GATE_UP,
        COMMON_SCALES=SHARED_GATE_UP_SCALES if plan.top_k else GATE_UP_SCALES,
        ACTIVATION=ACTIVATIONS[plan.geometry.activation],
        STORED=plan.stored,
        TILE=tile.outputs,
        TOKENS=tile.tokens,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["layer", "token_tiles"])
def _expand(
    lane,
    layer,
    x,
    order,
    blocks,
    number,
    activations,
    common_activations,
    token_tiles,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    COMMON_WIDTH: tl.constexpr,
    COMMON: tl.constexpr,
    COMMON_SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Programs of the common FFN, those of the same weights side by side; then those of pairs, by blocks."""
    HALF: tl.constexpr = TILE // 2
    COMMON_TILES: tl.constexpr = (COMMON_WIDTH + HALF - 1) // HALF
    program = tl.program_id(0)
    pair_program = program - token_tiles * COMMON_TILES
    if COMMON_WIDTH > 0:
        count = tl.load(lane + _QUERIES).to(tl.int32)
        first = program % token_tiles * TOKENS
        if (pair_program < 0) & (first < count):
            token = first + tl.arange(0, TOKENS)
            expand_tile(
                weights_at(layer_word(lane, layer, COMMON), STORED, x.dtype.element_ty),
                scales_at(lane, layer, COMMON_SCALES, STORED),
                program // token_tiles,
                x,
                token,
                token < count,
                common_activations,
                token,
                HIDDEN,
                COMMON_WIDTH,
                ACTIVATION,
                STORED,
                TILE,
                STEP,
            )
    if WIDTH > 0:
        TILES: tl.constexpr = (WIDTH + HALF - 1) // HALF
        if (pair_program >= 0) & (pair_program // TILES < tl.load(number)):
            block = blocks + pair_program // TILES * _FIELDS
            place = tl.load(block + 1) + tl.arange(0, TOKENS)
            live = place < tl.load(block + 2)
            expert = tl.load(block)
            matrix, scales = gate_up_of(lane, layer, expert, HIDDEN, WIDTH, STORED, x.dtype.element_ty)
            expand_tile(
                matrix,
                scales,
                pair_program % TILES,
                x,
                tl.load(order + place, mask=live, other=0) // TOP_K,
                live,
                activations,
                place,
                HIDDEN,
                WIDTH,
                ACTIVATION,
                STORED,
                TILE,
                STEP,
            )


@triton.jit
def gate_up_of(
    lane, layer, expert, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr
):
    """Where the weights and the scales of an expert's gate and up begin."""
    matrices = weights_at(layer_word(lane, layer, _GATE_UP), STORED, DTYPE)
    scales = scales_at(lane, layer, _GATE_UP_SCALES, STORED)
    blocks: tl.constexpr = (WIDTH + _SCALED - 1) // _SCALED
    return (
        expert_at(matrices, expert, 2 * WIDTH, HIDDEN),
        expert_at(scales, expert, 2 * blocks, (HIDDEN + _SCALED - 1) // _SCALED),
    )


@triton.jit
def expand_tile(
    matrix,
    scales,
    tile,
    x,
    token,
    live,
    out,
    place,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    begin=0,
):
    """Columns of one tile of ``x[token]`` expanded by one expert, to ``out[place]`` [.., WIDTH]; ``begin`` as
    ``multiply_all`` has it."""
    HALF: tl.constexpr = TILE // 2
    BLOCKS: tl.constexpr = (WIDTH + _SCALED - 1) // _SCALED
    SCALES: tl.constexpr = (HIDDEN + _SCALED - 1) // _SCALED
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.arange(0, TILE)
    column = tl.minimum(tile * HALF + row % HALF, WIDTH - 1)
    is_up = row // HALF
    weights = rows_at(matrix, column + is_up * WIDTH, HIDDEN)
    scale_rows = rows_at(scales, is_up * BLOCKS + column // _SCALED, SCALES)
    x_rows = rows_at(x, token, HIDDEN)
    total = multiply(weights, scale_rows, x_rows, live, begin, HIDDEN, HIDDEN, STORED, STEP)
    gate, up = total.reshape(2, HALF, token.shape[0]).permute(1, 2, 0).split()
    column = tile * HALF + tl.arange(0, HALF)
    at = rows_at(out, place, WIDTH)[None, :] + column[:, None]
    tl.store(at, gated(gate, up, ACTIVATION, dtype), mask=live[None, :] & (column < WIDTH)[:, None])
