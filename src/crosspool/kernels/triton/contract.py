"""The second half of an FFN: down of all pairs, and of all tokens for the common FFN, in one launch; then the
sum of each token's experts.

Each product is rounded to model dtype. A token's products are then added in float32 in the order of its
experts' ids, the common FFN last, by one program: nothing depends on which program was first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton.ffn_plan import FfnPlan, FfnRoom
from crosspool.kernels.triton.pairs import BLOCK_FIELDS
from crosspool.kernels.triton.product import (
    expert_at,
    multiply,
    multiply_all,
    rows_at,
    scales_at,
    sum_parts,
    weights_at,
)
from crosspool.kernels.triton.table import layer_word
from crosspool.kernels.triton.tiles import SCALED
from crosspool.kernels.triton.words import (
    EXPERT_DOWN,
    EXPERT_DOWN_SCALES,
    QUERIES,
    SHARED_DOWN,
    SHARED_DOWN_SCALES,
)

_QUERIES: tl.constexpr = tl.constexpr(QUERIES)
_EXPERT_DOWN: tl.constexpr = tl.constexpr(EXPERT_DOWN)
_EXPERT_DOWN_SCALES: tl.constexpr = tl.constexpr(EXPERT_DOWN_SCALES)
_SCALED: tl.constexpr = tl.constexpr(SCALED)
_FIELDS: tl.constexpr = tl.constexpr(BLOCK_FIELDS)

COMBINED = 512
"""Columns that a program combines."""


def contract(plan: FfnPlan, lane: Tensor, layer: int, room: FfnRoom) -> None:
    """The room's activations to its products."""
    tile = plan.tile
    tiles = triton.cdiv(plan.geometry.hidden, tile.outputs)
    common, routed = plan.token_tiles * plan.common.programs, plan.blocks * plan.routed.programs
    _contract[((common + routed) * tiles,)](
        lane,
        layer,
        *room.pairs,
        room.activations,
        room.common_activations,
        room.products,
        room.common_products,
        plan.capacity,
        plan.token_tiles,
        HIDDEN=plan.geometry.hidden,
        TOP_K=plan.top_k,
        WIDTH=plan.width,
        PARTS=plan.routed.programs,
        LENGTH=plan.routed.parts.length,
        COMMON_WIDTH=plan.common_width,
        COMMON=SHARED_DOWN if plan.top_k else EXPERT_DOWN,
        COMMON_SCALES=SHARED_DOWN_SCALES if plan.top_k else EXPERT_DOWN_SCALES,
        COMMON_PARTS=plan.common.programs,
        COMMON_LENGTH=plan.common.parts.length,
        STORED=plan.stored,
        TILE=tile.outputs,
        TOKENS=tile.tokens,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def combine(plan: FfnPlan, lane: Tensor, room: FfnRoom, out: Tensor) -> None:
    """The room's products and gains to ``out`` [T, H] in model dtype, of which the lane's QUERIES count."""
    hidden = plan.geometry.hidden
    columns = min(COMBINED, triton.next_power_of_2(hidden))
    _combine[(plan.capacity, triton.cdiv(hidden, columns))](
        lane,
        room.products,
        room.common_products,
        room.gains,
        out,
        plan.capacity,
        HIDDEN=hidden,
        TOP_K=plan.top_k,
        PARTS=plan.routed.programs,
        COMMON_PARTS=plan.common.programs if plan.common_width else 0,
        COLUMNS=columns,
        num_warps=2,
    )


@triton.jit(do_not_specialize=["layer", "capacity", "token_tiles"])
def _contract(
    lane,
    layer,
    order,
    blocks,
    number,
    activations,
    common_activations,
    products,
    common_products,
    capacity,
    token_tiles,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    COMMON_WIDTH: tl.constexpr,
    COMMON: tl.constexpr,
    COMMON_SCALES: tl.constexpr,
    COMMON_PARTS: tl.constexpr,
    COMMON_LENGTH: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Programs of the common FFN, those of the same weights side by side; then those of pairs, by blocks."""
    TILES: tl.constexpr = (HIDDEN + TILE - 1) // TILE
    program = tl.program_id(0)
    pair_program = program - token_tiles * TILES * COMMON_PARTS
    if COMMON_WIDTH > 0:
        count = tl.load(lane + _QUERIES).to(tl.int32)
        first = program % token_tiles * TOKENS
        if (pair_program < 0) & (first < count):
            token = first + tl.arange(0, TOKENS)
            contract_tile(
                weights_at(layer_word(lane, layer, COMMON), STORED, activations.dtype.element_ty),
                scales_at(lane, layer, COMMON_SCALES, STORED),
                program // token_tiles,
                common_activations,
                token,
                token < count,
                common_products,
                token,
                capacity,
                HIDDEN,
                COMMON_WIDTH,
                COMMON_PARTS,
                COMMON_LENGTH,
                STORED,
                TILE,
                STEP,
            )
    if WIDTH > 0:
        block_number = pair_program // (TILES * PARTS)
        if (pair_program >= 0) & (block_number < tl.load(number)):
            block = blocks + block_number * _FIELDS
            place = tl.load(block + 1) + tl.arange(0, TOKENS)
            live = place < tl.load(block + 2)
            expert = tl.load(block)
            matrix, scales = down_of(lane, layer, expert, HIDDEN, WIDTH, STORED, activations.dtype.element_ty)
            contract_tile(
                matrix,
                scales,
                pair_program % (TILES * PARTS),
                activations,
                place,
                live,
                products,
                tl.load(order + place, mask=live, other=0),
                capacity * TOP_K,
                HIDDEN,
                WIDTH,
                PARTS,
                LENGTH,
                STORED,
                TILE,
                STEP,
            )


@triton.jit
def down_of(
    lane, layer, expert, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr
):
    """Where the weights and the scales of an expert's down begin."""
    matrices = weights_at(layer_word(lane, layer, _EXPERT_DOWN), STORED, DTYPE)
    scales = scales_at(lane, layer, _EXPERT_DOWN_SCALES, STORED)
    return (
        expert_at(matrices, expert, HIDDEN, WIDTH),
        expert_at(scales, expert, (HIDDEN + _SCALED - 1) // _SCALED, (WIDTH + _SCALED - 1) // _SCALED),
    )


@triton.jit
def contract_tile(
    matrix,
    scales,
    tile_part,
    activations,
    place,
    live,
    products,
    row,
    rows,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    begin=0,
):
    """One tile, or with PARTS one part of its sums, of ``activations[place]`` contracted by one expert, to
    ``products[.., row]`` [PARTS, rows, HIDDEN]; ``begin`` as ``multiply_all`` has it."""
    SCALES: tl.constexpr = (WIDTH + _SCALED - 1) // _SCALED
    output = tile_part // PARTS * TILE + tl.arange(0, TILE)
    inside = output < HIDDEN
    weight_row = tl.minimum(output, HIDDEN - 1)
    weights = rows_at(matrix, weight_row, WIDTH)
    scale_rows = rows_at(scales, weight_row // _SCALED, SCALES)
    x = rows_at(activations, place, WIDTH)
    part = tile_part % PARTS
    if PARTS > 1:
        total = multiply(weights, scale_rows, x, live, begin + part * LENGTH, WIDTH, LENGTH, STORED, STEP)
    else:
        total = multiply_all(weights, scale_rows, x, live, WIDTH, LENGTH, STORED, STEP, begin)
    at = rows_at(products, part * rows + row, HIDDEN)[None, :] + output[:, None]
    tl.store(at, total.to(products.dtype.element_ty), mask=live[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["capacity"])
def _combine(
    lane,
    products,
    common_products,
    gains,
    out,
    capacity,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    COMMON_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    if token >= tl.load(lane + _QUERIES):
        return
    combine_columns(
        products,
        common_products,
        gains,
        out,
        capacity,
        token,
        tl.program_id(1),
        HIDDEN,
        TOP_K,
        PARTS,
        COMMON_PARTS,
        COLUMNS,
    )


@triton.jit
def combine_columns(
    products,
    common_products,
    gains,
    out,
    capacity,
    token,
    block,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    COMMON_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token's columns from ``block * COLUMNS`` on."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HIDDEN
    dtype: tl.constexpr = out.dtype.element_ty
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        stride = capacity.to(tl.int64) * (TOP_K * HIDDEN)
        product = sum_parts(rows_at(products, pair, HIDDEN) + column, inside, stride, PARTS)
        total += product.to(dtype).to(tl.float32) * tl.load(gains + pair)
    if COMMON_PARTS > 0:
        stride = capacity.to(tl.int64) * HIDDEN
        product = sum_parts(rows_at(common_products, token, HIDDEN) + column, inside, stride, COMMON_PARTS)
        total += product.to(dtype).to(tl.float32)
    tl.store(rows_at(out, token, HIDDEN) + column, total.to(dtype), mask=inside)
