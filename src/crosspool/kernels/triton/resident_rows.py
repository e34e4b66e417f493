"""What one of many programs does of each step of an FFN for few rows, when they stay on the chip together.

Rows are few enough for one tile of tokens, so an expert that was chosen is one **block**, and the tokens of
its tile are all rows, of which those count that chose it. So nothing is sorted: each program finds for itself
what all rows chose, from logits that all have computed, and knows every block.

Which tiles are a program's is known in advance: every so many, going on where the tiles before ended. All
tiles of a step read as many weights, and there are few for each program: to draw them one by one from a
counter would cost a round trip to memory before each, in which nothing is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.contract import combine_columns, contract_tile, down_of
from crosspool.kernels.triton.expand import expand_tile, gate_up_of
from crosspool.kernels.triton.product import scales_at, weights_at
from crosspool.kernels.triton.router import logits_part
from crosspool.kernels.triton.table import layer_word


@triton.jit
def logits_rows(
    lane,
    layer,
    x,
    count,
    parts,
    capacity,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Parts of logits. The last programs begin, which have the fewest tiles of the common FFN."""
    SHARES: tl.constexpr = (EXPERTS + TILE - 1) // TILE * PARTS
    token = tl.arange(0, TOKENS)
    for share in range(tl.num_programs(0) - 1 - tl.program_id(0), SHARES, tl.num_programs(0)):
        tile, part = share // PARTS, share % PARTS
        logits_part(
            lane,
            layer,
            x,
            token,
            token < count,
            tile,
            part,
            parts,
            capacity,
            HIDDEN,
            EXPERTS,
            LENGTH,
            TILE,
            STEP,
        )


@triton.jit
def blocks_of(chosen, count, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr):
    """What ``count`` rows of ``chosen`` int32 [.., TOP_K] chose: int32 [TOKENS, choices], -1 where there is
    nothing; the block of each expert, int32 [experts], -1 of those that nobody chose; how many there are."""
    CHOICES: tl.constexpr = triton.next_power_of_2(TOP_K) if TOP_K > 1 else 2
    BINS: tl.constexpr = triton.next_power_of_2(EXPERTS) if EXPERTS > 32 else 32
    token, choice = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHOICES)[None, :]
    real = (token < count) & (choice < TOP_K)
    choices = tl.load(chosen + token * TOP_K + choice, mask=real, other=-1)
    pairs = choices.reshape(TOKENS * CHOICES)
    used = (tl.histogram(tl.maximum(pairs, 0), BINS, mask=pairs >= 0) > 0).to(tl.int32)
    block = tl.where(used != 0, tl.cumsum(used, 0) - 1, -1)
    return choices, block, tl.sum(used)


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
    for tile in range(tl.program_id(0), TILES, tl.num_programs(0)):
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
    for tile in range(_first_after((COMMON_WIDTH + HALF - 1) // HALF), number * TILES, tl.num_programs(0)):
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
        )


@triton.jit
def contract_common_rows(
    lane,
    layer,
    count,
    activations,
    products,
    capacity,
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
    for tile_part in range(tl.program_id(0), TILES * PARTS, tl.num_programs(0)):
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
    for share in range(_first_after(COMMON_SHARES), number * SHARES, tl.num_programs(0)):
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
    for share in range(tl.program_id(0), count * BLOCKS, tl.num_programs(0)):
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
