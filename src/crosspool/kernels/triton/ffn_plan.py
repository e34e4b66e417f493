"""What is known of an FFN when a graph is recorded, and how its launches are cut for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from crosspool.kernels.triton.gate import ACTIVATIONS
from crosspool.kernels.triton.pairs import Pairs, most_blocks, pairs_room
from crosspool.kernels.triton.product import FLOAT8, FLOAT8_BITS, PLAIN
from crosspool.kernels.triton.router import Routing, check_routing, router_room
from crosspool.kernels.triton.tiles import Chip, Parts, PartsRoom, Tile, is_spread, parts_of, tile_for


class FfnGeometry(NamedTuple):
    """A layer's FFN as one device holds it: with tensor shards, ``width`` and ``shared_width`` are of the
    shard. ``width`` is of an expert or, without ``routing``, of the dense FFN; ``shared_width`` of the shared
    experts taken together (0: none). ``float8``: all but the router is e4m3 with scales (kernels/float8.py).
    """

    hidden: int
    width: int
    activation: str = "silu"
    routing: Routing | None = None
    shared_width: int = 0
    float8: bool = False


class Contraction(NamedTuple):
    """A down projection: the ``parts`` of its sums, and whether they are ``spread`` over programs."""

    parts: Parts
    spread: bool

    @property
    def programs(self) -> int:
        """Programs for each tile of products."""
        return self.parts.number if self.spread else 1


class FfnPlan(NamedTuple):
    """``experts``, of which each token has ``top_k`` of ``width`` (all 0 if dense), and the **common** FFN of
    all tokens, which is that of the shared experts or the dense one, of ``common_width`` (0: none).

    ``blocks`` is the most blocks of pairs, ``token_tiles`` the tiles of all tokens.
    """

    geometry: FfnGeometry
    capacity: int
    chip: Chip
    dtype: torch.dtype
    experts: int
    top_k: int
    width: int
    common_width: int
    stored: int
    tile: Tile
    blocks: int
    token_tiles: int
    routed: Contraction
    common: Contraction


def plan_ffn(geometry: FfnGeometry, capacity: int, dtype: torch.dtype, chip: Chip) -> FfnPlan:
    """For up to ``capacity`` tokens in ``dtype``. Raises ValueError for an FFN without columns and for rules
    that cannot choose, KeyError for an activation or a rule that nobody wrote."""
    if geometry.width < 1 or geometry.shared_width < 0:
        raise ValueError(f"an FFN of {geometry.width} columns, and {geometry.shared_width} shared")
    _ = ACTIVATIONS[geometry.activation]
    routing = geometry.routing
    experts, top_k = (routing.experts, routing.top_k) if routing else (0, 0)
    if routing:
        check_routing(routing)
    width, common_width = (geometry.width, geometry.shared_width) if routing else (0, geometry.width)
    pairs = capacity * top_k
    of_one = triton.cdiv(pairs, experts) if routing else capacity
    tile = tile_for(of_one, dtype, chip, geometry.float8)
    blocks, token_tiles = most_blocks(pairs, experts, tile.tokens), triton.cdiv(capacity, tile.tokens)
    output_tiles = triton.cdiv(geometry.hidden, tile.outputs)
    routed, common = parts_of(geometry.hidden, width, top_k), parts_of(geometry.hidden, common_width)
    return FfnPlan(
        geometry,
        capacity,
        chip,
        dtype,
        experts,
        top_k,
        width,
        common_width,
        (FLOAT8 if chip.has_float8 else FLOAT8_BITS) if geometry.float8 else PLAIN,
        tile,
        blocks,
        token_tiles if common_width else 0,
        Contraction(routed, is_spread(routed, tile, blocks * output_tiles)),
        Contraction(common, is_spread(common, tile, token_tiles * output_tiles)),
    )


class FfnRoom(NamedTuple):
    """Scratch of one FFN at a time. ``chosen``, ``gains`` and ``router`` as in router.py; ``activations`` of
    pairs [pairs, width] in their sorted order and of the common FFN [T, common_width]; ``products`` of pairs
    [parts, pairs, H] in the order of tokens and of the common FFN [parts, T, H]: in model dtype, or where
    there are parts in float32."""

    chosen: Tensor
    gains: Tensor
    router: PartsRoom
    pairs: Pairs
    activations: Tensor
    common_activations: Tensor
    products: Tensor
    common_products: Tensor


def ffn_room(plan: FfnPlan, device: torch.device) -> FfnRoom:
    capacity, hidden, routing = plan.capacity, plan.geometry.hidden, plan.geometry.routing
    empty = PartsRoom(torch.empty(0, device=device), torch.empty(0, dtype=torch.int32, device=device))

    def products(contraction: Contraction, rows: int) -> Tensor:
        dtype = torch.float32 if contraction.spread else plan.dtype
        return torch.empty(contraction.programs, rows, hidden, dtype=dtype, device=device)

    pairs = capacity * plan.top_k
    return FfnRoom(
        torch.empty(capacity, plan.top_k, dtype=torch.int32, device=device),
        torch.empty(capacity, plan.top_k, dtype=torch.float32, device=device),
        router_room(routing, hidden, capacity, plan.dtype, plan.chip, device) if routing else empty,
        pairs_room(capacity, plan.experts, plan.top_k, plan.tile.tokens, device),
        torch.empty(pairs, plan.width, dtype=plan.dtype, device=device),
        torch.empty(capacity, plan.common_width, dtype=plan.dtype, device=device),
        products(plan.routed, pairs),
        products(plan.common, capacity if plan.common_width else 0),
    )
