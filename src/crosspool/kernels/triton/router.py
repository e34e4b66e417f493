"""Expert choice, in one launch: logits by all programs, then each token's experts by the last to arrive."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton.expert_choice import best_experts, scores_of
from crosspool.kernels.triton.product import PLAIN, is_last, multiply, rows_at, sum_parts
from crosspool.kernels.triton.table import layer_weights
from crosspool.kernels.triton.tiles import SCALED, Chip, Parts, PartsRoom, Tile, parts_room, tile_for
from crosspool.kernels.triton.words import QUERIES, ROUTER, SELECTION_BIAS

_PLAIN: tl.constexpr = tl.constexpr(PLAIN)
_ROUTER: tl.constexpr = tl.constexpr(ROUTER)
_SELECTION_BIAS: tl.constexpr = tl.constexpr(SELECTION_BIAS)
_QUERIES: tl.constexpr = tl.constexpr(QUERIES)
_TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)

MOST_PARTS = 8
"""A router is small: what counts is that many programs read it. It is also added up more accurately."""

CHOOSING = 1024
"""Columns of tokens that are looked at together: more would not fit the registers of a program."""

SIGMOID = {"softmax": False, "sigmoid": True}
EXPERTS_THAT_RANK = {"max": 1, "top2_sum": 2}


class Routing(NamedTuple):
    """The arguments of interface.Router. ``biased``: there is a selection bias."""

    experts: int
    top_k: int
    scoring: str = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    biased: bool = False


def check_routing(routing: Routing) -> None:
    """Raises ValueError for rules that cannot choose ``top_k`` experts, KeyError for unknown ones."""
    experts, groups, top_groups = routing.experts, routing.groups, routing.top_groups
    best = EXPERTS_THAT_RANK[routing.group_score]
    _ = SIGMOID[routing.scoring]
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"{experts} experts in {groups} groups of which the best {top_groups} count")
    if groups > 1 and experts // groups < best:
        raise ValueError(f"{routing.group_score} ranks a group by {best} experts, of {experts // groups}")
    if not 1 <= routing.top_k <= experts // groups * top_groups:
        raise ValueError(f"top {routing.top_k} of {experts} experts, {top_groups} of {groups} groups")


def plan_router(
    routing: Routing, hidden: int, capacity: int, dtype: torch.dtype, chip: Chip
) -> tuple[Tile, Parts]:
    length = triton.cdiv(hidden, MOST_PARTS * SCALED) * SCALED
    tile = tile_for(min(capacity, 32), dtype, chip)
    return tile, Parts(triton.cdiv(hidden, length), length)


def router_room(
    routing: Routing, hidden: int, capacity: int, dtype: torch.dtype, chip: Chip, device: torch.device
) -> PartsRoom:
    tile, parts = plan_router(routing, hidden, capacity, dtype, chip)
    return parts_room(parts.number * capacity * routing.experts, triton.cdiv(capacity, tile.tokens), device)


def route(
    routing: Routing,
    lane: Tensor,
    layer: int,
    x: Tensor,
    chosen: Tensor,
    gains: Tensor,
    room: PartsRoom,
    chip: Chip,
) -> None:
    """``x`` [T, H] in model dtype to each token's experts ``chosen`` int32 [T, top_k], in the order of their
    ids, and their weights ``gains`` float32 [T, top_k].

    T is the capacity: the lane's QUERIES of them are computed. Logits are float32, added up in an order that
    depends on H alone. Of equal experts the lowest ids are chosen.
    """
    capacity, hidden = x.shape
    tile, parts = plan_router(routing, hidden, capacity, x.dtype, chip)
    expert_tiles, token_tiles = (
        triton.cdiv(routing.experts, tile.outputs),
        triton.cdiv(capacity, tile.tokens),
    )
    _route[(expert_tiles * token_tiles * parts.number,)](
        lane,
        layer,
        x,
        chosen,
        gains,
        room.parts,
        room.arrivals,
        capacity,
        HIDDEN=hidden,
        **routing_arguments(routing, tile),
        PARTS=parts.number,
        LENGTH=parts.length,
        TILE=tile.outputs,
        TOKENS=tile.tokens,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def routing_arguments(routing: Routing, tile: Tile) -> dict[str, int | float]:
    """What ``choose`` has to know of the rules, and how many of a tile's tokens it looks at together."""
    group_columns = triton.next_power_of_2(routing.experts // routing.groups)
    columns = triton.next_power_of_2(routing.groups) * group_columns
    return {
        "EXPERTS": routing.experts,
        "TOP_K": routing.top_k,
        "SIGMOID": SIGMOID[routing.scoring],
        "NORMALISE": routing.normalise,
        "SCALE": routing.scale,
        "GROUPS": routing.groups,
        "TOP_GROUPS": routing.top_groups,
        "BEST_OF_GROUP": EXPERTS_THAT_RANK[routing.group_score],
        "BIASED": routing.biased,
        "GROUP_COLUMNS": group_columns,
        "COLUMNS": columns,
        "CHOOSING": min(max(CHOOSING // columns, 1), tile.tokens),
    }


@triton.jit(do_not_specialize=["layer", "capacity"])
def _route(
    lane,
    layer,
    x,
    chosen,
    gains,
    parts,
    arrivals,
    capacity,
    HIDDEN: tl.constexpr,
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
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One part of a tile of logits; the last program of a tile of tokens chooses for them."""
    EXPERT_TILES: tl.constexpr = (EXPERTS + TILE - 1) // TILE
    token_tile = tl.program_id(0) // (EXPERT_TILES * PARTS)
    expert_tile = tl.program_id(0) // PARTS % EXPERT_TILES
    part = tl.program_id(0) % PARTS
    count = tl.load(lane + _QUERIES).to(tl.int32)
    first = token_tile * TOKENS
    if first >= count:
        return
    token = first + tl.arange(0, TOKENS)
    logits_part(
        lane,
        layer,
        x,
        token,
        token < count,
        expert_tile,
        part,
        parts,
        capacity,
        HIDDEN,
        EXPERTS,
        LENGTH,
        TILE,
        STEP,
    )
    if not is_last(arrivals + token_tile, EXPERT_TILES * PARTS):
        return
    for begin in range(first, tl.minimum(first + TOKENS, count), CHOOSING):
        choose(
            lane,
            layer,
            begin + tl.arange(0, CHOOSING),
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


@triton.jit
def logits_part(
    lane,
    layer,
    x,
    token,
    live,
    expert_tile,
    part,
    parts,
    capacity,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One part of the logits of a tile of experts for ``x[token]``, to ``parts`` [.., capacity, EXPERTS]."""
    expert = expert_tile * TILE + tl.arange(0, TILE)
    matrix = layer_weights(lane, layer, _ROUTER, x.dtype.element_ty)
    weights = rows_at(matrix, tl.minimum(expert, EXPERTS - 1), HIDDEN)
    logits = multiply(
        weights, weights, rows_at(x, token, HIDDEN), live, part * LENGTH, HIDDEN, LENGTH, _PLAIN, STEP
    )
    place = (part * capacity + token)[None, :] * EXPERTS + expert[:, None]
    tl.store(parts + place, logits, mask=live[None, :] & (expert < EXPERTS)[:, None])


@triton.jit
def choose(
    lane,
    layer,
    token,
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
    PARTS: tl.constexpr,
):
    """The experts of some tokens, from all parts of their logits."""
    GROUP: tl.constexpr = EXPERTS // GROUPS
    column = tl.arange(0, COLUMNS)
    expert = column // GROUP_COLUMNS * GROUP + column % GROUP_COLUMNS
    exists = ((column % GROUP_COLUMNS < GROUP) & (expert < EXPERTS))[None, :]
    wanted = (token < count)[:, None] & exists
    logits = parts + token[:, None] * EXPERTS + expert[None, :]
    scores = scores_of(sum_parts(logits, wanted, capacity * EXPERTS, PARTS), exists, SIGMOID)
    ranks = scores
    if BIASED:
        bias = layer_weights(lane, layer, _SELECTION_BIAS, tl.float32)
        ranks += tl.load((bias + expert)[None, :], mask=exists, other=0.0)
    best = best_experts(ranks, exists, TOP_K, GROUPS, TOP_GROUPS, BEST_OF_GROUP, GROUP_COLUMNS)
    if NORMALISE:
        total = tl.sum(tl.where(best != 0, scores, 0.0), 1)
        scores /= tl.maximum(total, _TINY)[:, None]
    place = token[:, None] * TOP_K + tl.cumsum(best, 1) - 1
    wanted = wanted & (best != 0)
    tl.store(chosen + place, expert[None, :] + tl.zeros_like(best), mask=wanted)
    tl.store(gains + place, scores * SCALE, mask=wanted)
