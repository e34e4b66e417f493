"""The FFN half of a layer for few rows, by programs that stay on the chip: one for each multiprocessor.

What ffn.py does in five launches is done here between meetings of all programs (ffn_queue.py), of any layer
of any model of the plan's geometry, for whichever lane asks. Tiles, and the order of every sum, are those of
ffn.py, and so are the results. A meeting costs a microsecond or more, which is why there are few: after the
logits, which are too much to read for each program to do all; after expand; and after contract.

It is an experiment: nothing serves from it until a GPU has shown that it wins over a graph of launches. How
that is decided is in docs/adr/0013-resident-ffn.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton import ffn_queue
from crosspool.kernels.triton.chip import all_registers
from crosspool.kernels.triton.ffn_plan import FfnPlan, FfnRoom, ffn_room
from crosspool.kernels.triton.ffn_queue import (
    FfnQueue,
    begin_launch,
    fail,
    look,
    retire,
    slot_of,
    take,
)
from crosspool.kernels.triton.gate import ACTIVATIONS
from crosspool.kernels.triton.resident_half import compute_half
from crosspool.kernels.triton.router import Routing, plan_router, routing_arguments
from crosspool.kernels.triton.table import aligned
from crosspool.kernels.triton.words import (
    EXPERT_DOWN,
    EXPERT_DOWN_SCALES,
    GATE_UP,
    GATE_UP_SCALES,
    QUERIES,
    SHARED_DOWN,
    SHARED_DOWN_SCALES,
    SHARED_GATE_UP,
    SHARED_GATE_UP_SCALES,
)

MOST_ROWS = 8
"""More have enough work for launches, and would not be worth a kernel that holds every multiprocessor."""

COMBINED = 128
"""Columns that a program combines: few, for there are more programs than a row has columns for."""

_FAILED: tl.constexpr = tl.constexpr(ffn_queue.FAILED)
_LANE: tl.constexpr = tl.constexpr(ffn_queue.LANE)
_LAYER: tl.constexpr = tl.constexpr(ffn_queue.LAYER)
_X: tl.constexpr = tl.constexpr(ffn_queue.X)
_OUT: tl.constexpr = tl.constexpr(ffn_queue.OUT)
_QUERIES: tl.constexpr = tl.constexpr(QUERIES)


def resident_room(plan: FfnPlan, programs: int, device: torch.device) -> FfnRoom:
    """Scratch of a queue, as that of ffn.py, but that each program has ``chosen`` and ``gains`` of its own:
    [programs, capacity, top_k]. Raises ValueError for more rows than one tile is meant for."""
    if not 1 <= plan.capacity <= MOST_ROWS or programs < 1:
        raise ValueError(f"{programs} resident programs for {plan.capacity} rows; {MOST_ROWS} is the most")
    shape = (programs, plan.capacity, plan.top_k)
    return ffn_room(plan, device)._replace(
        chosen=torch.empty(shape, dtype=torch.int32, device=device),
        gains=torch.empty(shape, dtype=torch.float32, device=device),
    )


def serve(plan: FfnPlan, queue: FfnQueue, room: FfnRoom, launch: int) -> None:
    """Launch the kernel that serves the queue until nobody asks. Launches of a queue are numbered from 1 on
    and go into one stream; what they serve has up to ``plan.capacity`` rows in its dtype.

    The device must be able to run all of the queue's programs at once: they are one for each multiprocessor
    at most, and no kernel that waits for them may take so much of one that a program finds no place there.
    """
    geometry, routing = plan.geometry, plan.geometry.routing
    rules = routing or Routing(1, 1)
    router_tile, logits = plan_router(rules, geometry.hidden, plan.capacity, plan.dtype, plan.chip)
    _serve[(queue.programs,)](
        queue.words,
        queue.news,
        launch,
        queue.patience,
        queue.most_looks,
        room.router.parts,
        room.chosen,
        room.gains,
        room.activations,
        room.common_activations,
        room.products,
        room.common_products,
        plan.capacity,
        0,  # Where sums begin: see product.py.
        SLOTS=queue.slots,
        **routing_arguments(rules, router_tile) | {"TOP_K": plan.top_k},
        HIDDEN=geometry.hidden,
        WIDTH=plan.width,
        PARTS=plan.routed.programs,
        LENGTH=plan.routed.parts.length,
        COMMON_WIDTH=plan.common_width,
        COMMON_PARTS=plan.common.programs if plan.common_width else 0,
        COMMON_LENGTH=plan.common.parts.length,
        COMMON_UP=SHARED_GATE_UP if plan.top_k else GATE_UP,
        COMMON_UP_SCALES=SHARED_GATE_UP_SCALES if plan.top_k else GATE_UP_SCALES,
        COMMON_DOWN=SHARED_DOWN if plan.top_k else EXPERT_DOWN,
        COMMON_DOWN_SCALES=SHARED_DOWN_SCALES if plan.top_k else EXPERT_DOWN_SCALES,
        ACTIVATION=ACTIVATIONS[geometry.activation],
        STORED=plan.stored,
        TILE=plan.tile.outputs,
        TOKENS=plan.tile.tokens,
        STEP=plan.tile.step,
        LOGITS_PARTS=logits.number,
        LOGITS_LENGTH=logits.length,
        LOGITS_TILE=router_tile.outputs,
        LOGITS_STEP=router_tile.step,
        COMBINED=min(COMBINED, triton.next_power_of_2(geometry.hidden)),
        num_warps=plan.tile.warps,
        num_stages=2 * router_tile.stages,  # It is alone on its multiprocessor.
        **all_registers(),
    )


@triton.jit(do_not_specialize=["launch", "patience", "most_looks", "capacity"])
def _serve(
    queue,
    news,
    launch,
    patience,
    most_looks,
    logits,
    chosen,
    gains,
    activations,
    common_activations,
    products,
    common_products,
    capacity,
    begin,
    SLOTS: tl.constexpr,
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
    """All programs take the same entries and come to the same meetings. One that has waited too long has no
    rows from then on, and is at its end."""
    sequence, met = begin_launch(queue, launch)
    own = tl.program_id(0) * capacity * TOP_K
    dtype: tl.constexpr = activations.dtype.element_ty
    in_time = True
    serving = look(queue + _FAILED) == 0
    while serving:
        in_time = take(queue, launch, sequence, met, patience, most_looks, SLOTS)
        slot = slot_of(queue, sequence, SLOTS)
        serving = in_time & (tl.load(slot + _LANE) != 0)
        if serving:
            lane = tl.load(slot + _LANE).to(tl.pointer_type(tl.int64))
            layer = tl.load(slot + _LAYER)
            x, out = aligned(tl.load(slot + _X), dtype), aligned(tl.load(slot + _OUT), dtype)
            count = tl.load(lane + _QUERIES).to(tl.int32)
            met, in_time = compute_half(
                queue,
                met,
                most_looks,
                lane,
                layer,
                x,
                count,
                out,
                logits,
                chosen + own,
                gains + own,
                activations,
                common_activations,
                products,
                common_products,
                capacity,
                begin,
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
                HIDDEN,
                WIDTH,
                PARTS,
                LENGTH,
                COMMON_WIDTH,
                COMMON_PARTS,
                COMMON_LENGTH,
                COMMON_UP,
                COMMON_UP_SCALES,
                COMMON_DOWN,
                COMMON_DOWN_SCALES,
                ACTIVATION,
                STORED,
                TILE,
                TOKENS,
                STEP,
                LOGITS_PARTS,
                LOGITS_LENGTH,
                LOGITS_TILE,
                LOGITS_STEP,
                COMBINED,
            )
        if in_time:
            retire(slot)
        serving = serving & in_time
        sequence += 1
    if not in_time:
        fail(queue, news)
