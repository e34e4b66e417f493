"""What one of many programs does of each step of an FFN for few rows, when they stay on the chip together.

Blocks are those of resident_choice.py, and ``begin`` is 0: product.py says why it is an argument.

Which tiles are a program's is known in advance: every so many, going on where the tiles before ended. All
tiles of a step read as many weights, and there are few for each program: to draw them one by one from a
counter would cost a round trip to memory before each, in which nothing is loaded.

What does not change from tile to tile is computed again for each: moved out of its loop, it would be moved
out of the loop over entries too, and take registers from all other steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.contract import combine_columns, contract_tile, down_of
from crosspool.kernels.triton.expand import expand_tile, gate_up_of
from crosspool.kernels.triton.product import scales_at, weights_at
from crosspool.kernels.triton.table import layer_word


@triton.jit
def _block(choices, blocks, number, TOP_K: tl.constexpr):
    """The expert of a block; which rows chose it [TOKENS], and the pair of each that did."""
    expert = tl.sum(tl.where(blocks == number, tl.arange(0, blocks.shape[0]), 0))
    picked = (choices == expert).to(tl.int32)
    pair = tl.arange(0, choices.shape[0]) * TOP_K
    pair += tl.sum(picked * tl.arange(0, choices.shape[1])[None, :], 1)
    return expert, tl.sum(picked, 1) != 0, pair


@triton.jit
def _first_after(tiles):
    """This program's first tile of a step, where tiles of another were dealt out before."""
    return (tl.program_id(0) + tl.num_programs(0) - tiles % tl.num_programs(0)) % tl.num_programs(0)


@triton.jit
def expand_common_rows(
    lane,
    layer,
    x,
    count,
    activations,
    begin,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    WORD: tl.constexpr,
    SCALES_WORD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows of ``x`` expanded by the common FFN, to ``activations`` [.., WIDTH]."""
    TILES: tl.constexpr = (WIDTH + TILE // 2 - 1) // (TILE // 2)
    matrix = weights_at(layer_word(lane, layer, WORD), STORED, x.dtype.element_ty)
    scales = scales_at(lane, layer, SCALES_WORD, STORED)
    token = tl.arange(0, TOKENS)
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), disable_licm=True):
        expand_tile(
            matrix,
            scales,
            tile,
            x,
            token,
            token < count,
            activations,
            token,
            HIDDEN,
            WIDTH,
            ACTIVATION,
            STORED,
            TILE,
            STEP,
            begin,
        )


@triton.jit
def expand_pairs(
    lane,
    layer,
    x,
    choices,
    blocks,
    number,
    activations,
    begin,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    COMMON_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows of ``x`` expanded by the experts of ``number`` blocks, to ``activations`` of pairs [.., WIDTH]."""
    HALF: tl.constexpr = TILE // 2
    TILES: tl.constexpr = (WIDTH + HALF - 1) // HALF
    token = tl.arange(0, choices.shape[0])
    first = _first_after((COMMON_WIDTH + HALF - 1) // HALF)
    for tile in tl.range(first, number * TILES, tl.num_programs(0), disable_licm=True):
        expert, live, pair = _block(choices, blocks, tile // TILES, TOP_K)
        matrix, scales = gate_up_of(lane, layer, expert, HIDDEN, WIDTH, STORED, x.dtype.element_ty)
        expand_tile(
            matrix,
            scales,
            tile % TILES,
            x,
            token,
            live,
            activations,
            pair,
            HIDDEN,
            WIDTH,
            ACTIVATION,
            STORED,
            TILE,
            STEP,
            begin,
        )


@triton.jit
def contract_common_rows(
    lane,
    layer,
    count,
    activations,
    products,
    capacity,
    begin,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    WORD: tl.constexpr,
    SCALES_WORD: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows of ``activations`` contracted by the common FFN, to ``products`` [PARTS, capacity, HIDDEN]."""
    TILES: tl.constexpr = (HIDDEN + TILE - 1) // TILE
    matrix = weights_at(layer_word(lane, layer, WORD), STORED, activations.dtype.element_ty)
    scales = scales_at(lane, layer, SCALES_WORD, STORED)
    token = tl.arange(0, TOKENS)
    for tile_part in tl.range(tl.program_id(0), TILES * PARTS, tl.num_programs(0), disable_licm=True):
        contract_tile(
            matrix,
            scales,
            tile_part,
            activations,
            token,
            token < count,
            products,
            token,
            capacity,
            HIDDEN,
            WIDTH,
            PARTS,
            LENGTH,
            STORED,
            TILE,
            STEP,
            begin,
        )


@triton.jit
def contract_pairs(
    lane,
    layer,
    choices,
    blocks,
    number,
    activations,
    products,
    capacity,
    begin,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    COMMON_SHARES: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """``activations`` of pairs contracted by the experts of ``number`` blocks, to ``products`` of pairs
    [PARTS, pairs, HIDDEN]. COMMON_SHARES is how many tiles, or parts of them, the common FFN has."""
    SHARES: tl.constexpr = (HIDDEN + TILE - 1) // TILE * PARTS
    first = _first_after(COMMON_SHARES)
    for share in tl.range(first, number * SHARES, tl.num_programs(0), disable_licm=True):
        expert, live, pair = _block(choices, blocks, share // SHARES, TOP_K)
        matrix, scales = down_of(lane, layer, expert, HIDDEN, WIDTH, STORED, activations.dtype.element_ty)
        contract_tile(
            matrix,
            scales,
            share % SHARES,
            activations,
            pair,
            live,
            products,
            pair,
            capacity * TOP_K,
            HIDDEN,
            WIDTH,
            PARTS,
            LENGTH,
            STORED,
            TILE,
            STEP,
            begin,
        )


@triton.jit
def combine_rows(
    products,
    common_products,
    gains,
    out,
    capacity,
    count,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    COMMON_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns of rows."""
    BLOCKS: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    for share in tl.range(tl.program_id(0), count * BLOCKS, tl.num_programs(0), disable_licm=True):
        row = tl.full((), share // BLOCKS, tl.int32)
        combine_columns(
            products,
            common_products,
            gains,
            out,
            capacity,
            row,
            share % BLOCKS,
            HIDDEN,
            TOP_K,
            PARTS,
            COMMON_PARTS,
            COLUMNS,
        )
