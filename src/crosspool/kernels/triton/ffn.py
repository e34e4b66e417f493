"""The FFN half of a layer: dense, or routed experts and shared ones, for all tokens of a pass.

A token and one of its experts are a **pair**. Five launches: route (tokens to experts), sort pairs by
expert, expand, contract, combine; a dense FFN is the last three. Every one of them is sized for a capacity
and reads from the lane how many tokens there are, so that they can be recorded in a graph: what is surplus
ends at once. A token's bits depend on no other token.

With one token, expand and contract still have two or more programs for each multiprocessor of a large chip
(tiles.py): experts, times halves of FEW_OUTPUTS columns of each, or tiles of the output, times parts of long
sums. Routed and shared experts are in one launch, so that neither waits for the other's last programs.
"""

from __future__ import annotations

from torch import Tensor

from crosspool.kernels.triton.contract import combine, contract
from crosspool.kernels.triton.expand import expand
from crosspool.kernels.triton.ffn_plan import FfnPlan, FfnRoom
from crosspool.kernels.triton.pairs import sort_pairs
from crosspool.kernels.triton.router import route


def ffn(plan: FfnPlan, lane: Tensor, layer: int, x: Tensor, out: Tensor, room: FfnRoom) -> None:
    """``x`` [T, H], normed hidden states in the plan's dtype, to ``out`` [T, H], without the residual. T is
    the plan's capacity; the lane's QUERIES of them are computed, the others of ``out`` are left alone.

    Of a shard this is a part, rounded to model dtype: the parts of all devices are added in float32.
    """
    routing = plan.geometry.routing
    if routing:
        route(routing, lane, layer, x, room.chosen, room.gains, room.router, plan.chip)
        sort_pairs(room.chosen, lane, plan.experts, plan.tile.tokens, room.pairs)
    expand(plan, lane, layer, x, room)
    contract(plan, lane, layer, room)
    combine(plan, lane, room, out)
