"""What each of many programs that stay on the chip together finds out for itself: which experts rows chose.

Rows are few enough for one tile of tokens, so an expert that was chosen is one **block**, and the tokens of
its tile are all rows, of which those count that chose it. So nothing is sorted: each program finds for itself
what all rows chose, from logits that all have computed, and knows every block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.router import choose, logits_part


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
    first = tl.num_programs(0) - 1 - tl.program_id(0)
    for share in tl.range(first, SHARES, tl.num_programs(0), disable_licm=True):
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
def choose_rows(
    lane,
    layer,
    count,
    parts,
    capacity,
    chosen,
    gains,
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
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The experts of all rows, from ``parts`` of their logits, to this program's own ``chosen`` and ``gains``
    [.., TOP_K]; and their blocks, as ``blocks_of`` has them."""
    for first in tl.range(0, count, CHOOSING, disable_licm=True):
        choose(
            lane,
            layer,
            first + tl.arange(0, CHOOSING),
            count,
            parts,
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
            PARTS,
        )
    tl.debug_barrier()  # What some threads have stored, others load.
    return blocks_of(chosen, count, EXPERTS, TOP_K, TOKENS)


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
