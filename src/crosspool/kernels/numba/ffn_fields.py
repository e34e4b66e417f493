"""An FFN's descriptor, and the scratch that its kernels use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.activation import ACTIVATIONS
from crosspool.kernels.numba.amx import group_bytes
from crosspool.kernels.numba.amx_tile import DEPTH, SIDE
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import BFLOAT16
from crosspool.kernels.numba.linear import BY_UNIT, VECTORS_AT_ONCE, rows_of_unit
from crosspool.kernels.numba.matrix import MATRIX_WORDS, Weight, describe_matrix
from crosspool.kernels.numba.router import EXPERTS, GROUPS, ROUTER_WORDS, TOP_K

ACTIVATION, ROUTED, CHOICES, SHARED_EXPERT, HIDDEN, WIDEST, MOST_ROWS, PACKABLE, ROUTER = range(9)
MATRICES = ROUTER + ROUTER_WORDS
"""ROUTED experts, of which a token has CHOICES, and then SHARED_EXPERT (0 or 1) more: gate, up and down of
each from field MATRICES on. WIDEST is the largest intermediate size, MOST_ROWS that of a unit of any gate.
PACKABLE: the matrix unit multiplies all weights as they are."""

EXPERT_WORDS = 3 * MATRIX_WORDS
DOWN_ROWS = 64
"""Output elements that a thread claims at once, of all experts."""

CACHE_LINE = 64
MOST_DOWN_ROWS = 256
"""The same at most where vectors are packed."""

PACKED_FROM = 33
"""With so many tokens or more, vectors are packed for the matrix unit once, and not by each unit of work."""


class Expert(NamedTuple):
    """``gate`` and ``up`` [I, H], ``down`` [H, I], of a shard perhaps."""

    gate: Weight
    up: Weight
    down: Weight


def describe_ffn(
    activation: str, experts: Sequence[Expert], router: np.ndarray | None, shared: Expert | None
) -> np.ndarray:
    """An FFN's descriptor. ``router`` is from describe_router; without one there is one expert, for all."""
    members = [*experts, *([] if shared is None else [shared])]
    fields = np.zeros(MATRICES + EXPERT_WORDS * len(members), np.int64)
    fields[ACTIVATION] = ACTIVATIONS[activation]
    fields[ROUTED], fields[SHARED_EXPERT] = len(experts), shared is not None
    fields[CHOICES] = fields[PACKABLE] = 1
    if router is not None:
        fields[ROUTER : ROUTER + ROUTER_WORDS] = router
        fields[CHOICES] = router[TOP_K]
    if (router is None and len(experts) != 1) or (router is not None and router[EXPERTS] != len(experts)):
        raise ValueError(
            f"{len(experts)} experts, and a router of {0 if router is None else router[EXPERTS]}"
        )
    for index, expert in enumerate(members):
        gate, up, down = (describe_matrix(weight) for weight in expert)
        if not (gate.rows == up.rows == down.columns and gate.columns == up.columns == down.rows):
            raise ValueError(f"expert {index}: gate, up and down do not fit: {gate}, {up}, {down}")
        begin = MATRICES + EXPERT_WORDS * index
        fields[begin : begin + EXPERT_WORDS] = (*gate, *up, *down)
        fields[HIDDEN] = gate.columns
        fields[WIDEST] = max(int(fields[WIDEST]), gate.rows)
        fields[MOST_ROWS] = max(int(fields[MOST_ROWS]), min(gate.rows, int(rows_of_unit(gate))))
        fields[PACKABLE] &= BY_UNIT and gate.dtype == up.dtype == down.dtype == BFLOAT16
    return fields


class Room(NamedTuple):
    """Addresses of the scratch that all threads share. P pairs of T tokens, E members, the shared one too.

    ``logits`` float32 [T, E + groups]; ``chosen`` int64 and ``gains`` float32 [T, choices] of each token;
    ``begins`` int64 [E + 1] where each member's pairs begin; of each pair int64 [P] ``tokens``, the address
    of its input ``inputs`` and of its activations ``places``, and float32 ``pair_gains``; ``x`` int64 [T] the
    tokens' inputs; ``activations`` [P, WIDEST] in model dtype.

    Where vectors are packed, ``groups`` int64 [E + 1] says where each member's groups of SIDE pairs begin;
    ``packed`` are those of the inputs, and ``activations`` those of activations, WIDEST elements each.
    """

    logits: int
    chosen: int
    gains: int
    begins: int
    tokens: int
    inputs: int
    places: int
    pair_gains: int
    x: int
    groups: int
    activations: int
    packed: int
    end: int


@inline
def packs(fields, count, dtype):
    """Whether the vectors of so many tokens are packed before they are multiplied."""
    return fields[PACKABLE] != 0 and dtype == BFLOAT16 and count >= PACKED_FROM


@inline
def _most_groups(members, pairs):
    """Each member's last group may have one pair only."""
    return min(members, pairs) + pairs // SIDE


@inline
def room_of(room, fields, count):
    """Where everything is, from address ``room`` on; whole words each."""
    members = fields[ROUTED] + fields[SHARED_EXPERT]
    choices = count * fields[CHOICES]
    pairs = choices + count * fields[SHARED_EXPERT]
    logits = room
    chosen = logits + 8 * count * (fields[ROUTED] + fields[ROUTER + GROUPS])
    gains = chosen + 8 * choices
    begins = gains + 8 * choices
    tokens = begins + 8 * (members + 1)
    inputs = tokens + 8 * pairs
    places = inputs + 8 * pairs
    pair_gains = places + 8 * pairs
    x = pair_gains + 8 * pairs
    groups = x + 8 * count
    activations = -(-(groups + 8 * (members + 1)) // CACHE_LINE) * CACHE_LINE
    most = _most_groups(members, pairs)
    size = most * group_bytes(fields[WIDEST]) if fields[PACKABLE] != 0 else 0
    packed = activations + max(4 * pairs * fields[WIDEST], size)
    end = packed + (most * group_bytes(fields[HIDDEN]) if fields[PACKABLE] != 0 else 0)
    return Room(
        logits, chosen, gains, begins, tokens, inputs, places, pair_gains, x, groups, activations, packed, end
    )


@kernel
def _end_of_room(fields, count):
    return room_of(np.int64(0), fields, count).end


def ffn_room_bytes(fields: np.ndarray, tokens: int) -> int:
    """Scratch shared by the team, for up to ``tokens`` tokens."""
    return CACHE_LINE + int(_end_of_room(fields, tokens))


def ffn_mine_bytes(fields: np.ndarray, tokens: int) -> int:
    """Scratch of each thread, for up to ``tokens`` tokens."""
    products = VECTORS_AT_ONCE * max(2 * int(fields[MOST_ROWS]), DOWN_ROWS)
    unit = -(-int(fields[MOST_ROWS]) // DEPTH) * DEPTH
    few = 4 * (products + tokens * DOWN_ROWS)
    many = 4 * (2 * SIDE * DOWN_ROWS + tokens * MOST_DOWN_ROWS)
    return max(few, many, CACHE_LINE + (2 * 4 + 2) * 2 * SIDE * unit)
