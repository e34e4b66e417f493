"""One FFN half, by programs that stay on the chip together, between their meetings (resident_ffn.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.ffn_queue import arrive, await_all
from crosspool.kernels.triton.resident_choice import choose_rows, logits_rows
from crosspool.kernels.triton.resident_rows import (
    combine_rows,
    contract_common_rows,
    contract_pairs,
    expand_common_rows,
    expand_pairs,
)


@triton.jit
def compute_half(
    queue,
    met,
    most_looks,
    lane,
    layer,
    x,
    count,
    out,
    logits,
    chosen,
    gains,
    activations,
    common_activations,
    products,
    common_products,
    capacity,
    begin,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOOSING: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    COMMON_WIDTH: tl.constexpr,
    COMMON_PARTS: tl.constexpr,
    COMMON_LENGTH: tl.constexpr,
    COMMON_UP: tl.constexpr,
    COMMON_UP_SCALES: tl.constexpr,
    COMMON_DOWN: tl.constexpr,
    COMMON_DOWN_SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    LOGITS_PARTS: tl.constexpr,
    LOGITS_LENGTH: tl.constexpr,
    LOGITS_TILE: tl.constexpr,
    LOGITS_STEP: tl.constexpr,
    COMBINED: tl.constexpr,
):
    """This program's share of ``count`` rows of ``x``, to ``out``. ``chosen`` and ``gains`` are its own, the
    other scratch is everybody's, and ``begin`` is 0 (product.py).

    Returns how many meetings there have been, of ``met`` before, and whether none took too long: after one
    that did there are no rows.
    """
    in_time = True
    if TOP_K > 0:
        logits_rows(
            lane,
            layer,
            x,
            count,
            logits,
            capacity,
            HIDDEN,
            EXPERTS,
            LOGITS_PARTS,
            LOGITS_LENGTH,
            LOGITS_TILE,
            TOKENS,
            LOGITS_STEP,
        )
        arrive(queue)
    if COMMON_WIDTH > 0:
        expand_common_rows(
            lane,
            layer,
            x,
            count,
            common_activations,
            begin,
            HIDDEN,
            COMMON_WIDTH,
            COMMON_UP,
            COMMON_UP_SCALES,
            ACTIVATION,
            STORED,
            TILE,
            TOKENS,
            STEP,
        )
    if TOP_K > 0:
        met += 1
        in_time = await_all(queue, met, most_looks)
        count = tl.where(in_time, count, 0)
        choices, blocks, number = choose_rows(
            lane,
            layer,
            count,
            logits,
            capacity,
            chosen,
            gains,
            EXPERTS,
            TOP_K,
            SIGMOID,
            NORMALISE,
            SCALE,
            GROUPS,
            TOP_GROUPS,
            BEST_OF_GROUP,
            BIASED,
            GROUP_COLUMNS,
            COLUMNS,
            CHOOSING,
            LOGITS_PARTS,
            TOKENS,
        )
        expand_pairs(
            lane,
            layer,
            x,
            choices,
            blocks,
            number,
            activations,
            begin,
            HIDDEN,
            TOP_K,
            WIDTH,
            COMMON_WIDTH,
            ACTIVATION,
            STORED,
            TILE,
            STEP,
        )
    met += 1
    if in_time:
        arrive(queue)
        in_time = await_all(queue, met, most_looks)
    count = tl.where(in_time, count, 0)
    if COMMON_WIDTH > 0:
        contract_common_rows(
            lane,
            layer,
            count,
            common_activations,
            common_products,
            capacity,
            begin,
            HIDDEN,
            COMMON_WIDTH,
            COMMON_DOWN,
            COMMON_DOWN_SCALES,
            COMMON_PARTS,
            COMMON_LENGTH,
            STORED,
            TILE,
            TOKENS,
            STEP,
        )
    if TOP_K > 0:
        contract_pairs(
            lane,
            layer,
            choices,
            blocks,
            tl.where(in_time, number, 0),
            activations,
            products,
            capacity,
            begin,
            HIDDEN,
            TOP_K,
            WIDTH,
            PARTS,
            LENGTH,
            (HIDDEN + TILE - 1) // TILE * COMMON_PARTS,
            STORED,
            TILE,
            STEP,
        )
    met += 1
    if in_time:
        arrive(queue)
        in_time = await_all(queue, met, most_looks)
    combine_rows(
        products,
        common_products,
        gains,
        out,
        capacity,
        tl.where(in_time, count, 0),
        HIDDEN,
        TOP_K,
        PARTS,
        COMMON_PARTS,
        COMBINED,
    )
    return met, in_time
