"""The FFN half of a layer: dense, or routed experts and a shared one, for all tokens of a pass.

A token and one of its experts are a **pair**. Pairs are sorted by expert, so that all tokens of an expert
share one read of its weights; the shared expert, and a dense FFN, are experts of every token. Results of a
token's experts are added in float32 in the order of expert ids, the shared one last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.activation import ACTIVATIONS, gate_by
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes, narrow, round_to
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.linear import VECTORS_AT_ONCE, multiply_rows, rows_of_unit
from crosspool.kernels.numba.matrix import MATRIX_WORDS, Weight, describe_matrix, matrix_at
from crosspool.kernels.numba.router import EXPERTS, GROUPS, ROUTER_WORDS, TOP_K, route, router_logits
from crosspool.kernels.numba.team import claim, meet, share

ACTIVATION, ROUTED, CHOICES, SHARED_EXPERT, HIDDEN, WIDEST, MOST_ROWS, ROUTER = range(8)
MATRICES = ROUTER + ROUTER_WORDS
"""ROUTED experts, of which a token has CHOICES, and then SHARED_EXPERT (0 or 1) more: gate, up and down of
each from field MATRICES on. WIDEST is the largest intermediate size, MOST_ROWS that of a unit of any gate."""

EXPERT_WORDS = 3 * MATRIX_WORDS
DOWN_ROWS = 64
"""Output elements that a thread claims at once, of all experts."""

TOKENS_ROUTED_AT_ONCE = 4
"""So few tokens are routed and sorted by one thread: a meeting costs more."""


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
    fields[CHOICES] = 1
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
    return fields


class Room(NamedTuple):
    """Addresses of the scratch that all threads share. P pairs of T tokens, E members, the shared one too.

    ``logits`` float32 [T, E + groups]; ``chosen`` int64 and ``gains`` float32 [T, choices] of each token;
    ``begins`` int64 [E + 1] where each member's pairs begin; of each pair int64 [P] ``tokens``, the address
    of its input ``inputs`` and of its activations ``places``, and float32 ``pair_gains``; ``x`` int64 [T] the
    tokens' inputs; ``activations`` [P, WIDEST] in model dtype.
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
    activations: int
    end: int


@inline
def _room(room, fields, count):
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
    activations = x + 8 * count
    end = activations + 4 * pairs * fields[WIDEST]
    return Room(logits, chosen, gains, begins, tokens, inputs, places, pair_gains, x, activations, end)


def ffn_room_bytes(fields: np.ndarray, tokens: int) -> int:
    """Scratch shared by the team, for up to ``tokens`` tokens."""
    members, choices = int(fields[ROUTED] + fields[SHARED_EXPERT]), tokens * int(fields[CHOICES])
    pairs = choices + tokens * int(fields[SHARED_EXPERT])
    logits = tokens * int(fields[ROUTED] + fields[ROUTER + GROUPS])
    return 8 * (logits + 2 * choices + members + 1 + 4 * pairs + tokens) + 4 * pairs * int(fields[WIDEST])


def ffn_mine_bytes(fields: np.ndarray, tokens: int) -> int:
    """Scratch of each thread, for up to ``tokens`` tokens."""
    products = VECTORS_AT_ONCE * max(2 * int(fields[MOST_ROWS]), DOWN_ROWS)
    return 4 * (products + tokens * DOWN_ROWS)


@kernel
def ffn_half(shared, own, fields, normed, count, dtype, room, mine, out):
    """All threads together: ``normed`` [count, H] at an address, in ``dtype``, to ``out`` [count, H].

    ``room`` and ``mine`` are the addresses of shared and own scratch, see ffn_room_bytes and ffn_mine_bytes.
    Returns when every thread is done.
    """
    places = _room(room, fields, count)
    _route(shared, own, fields, normed, count, dtype, places)
    _expand(shared, own, fields, dtype, places, mine)
    _contract(shared, own, fields, count, dtype, places, mine, out)


@inline
def _route(shared, own, fields, normed, count, dtype, room):
    """Fill everything in the room but the activations."""
    routed = fields[ROUTED] > 1 or fields[ROUTER + EXPERTS] > 0
    router = fields[ROUTER:MATRICES]
    few = count <= TOKENS_ROUTED_AT_ONCE
    if routed:
        width = fields[HIDDEN] * element_bytes(dtype)
        share(own, 1)
        if claim(shared, own) == 0:
            x = words(room.x, count)
            for token in range(count):
                x[token] = normed + token * width
            claim(shared, own)
        meet(shared, own)
        router_logits(shared, own, router, words(room.x, count), dtype, count, room.logits)
        if not few:
            share(own, count)
            token = claim(shared, own)
            while token >= 0:
                _route_token(fields, router, room, token)
                token = claim(shared, own)
            meet(shared, own)
    share(own, 1)
    if claim(shared, own) == 0:
        if routed and few:
            for token in range(count):
                _route_token(fields, router, room, token)
        _sort(fields, routed, normed, count, dtype, room)
        claim(shared, own)
    meet(shared, own)


@inline
def _route_token(fields, router, room, token):
    choices = fields[CHOICES]
    logits = room.logits + 4 * token * (fields[ROUTED] + fields[ROUTER + GROUPS])
    chosen = words(room.chosen + 8 * token * choices, choices)
    route(router, logits, chosen, floats(room.gains + 4 * token * choices, choices))


@inline
def _sort(fields, routed, normed, count, dtype, room):
    """Pairs by member and then by token."""
    choices, members = fields[CHOICES], fields[ROUTED] + fields[SHARED_EXPERT]
    pairs = count * (choices + fields[SHARED_EXPERT])
    chosen, gains = words(room.chosen, count * choices), floats(room.gains, count * choices)
    begins = words(room.begins, members + 1)
    tokens, inputs, places = words(room.tokens, pairs), words(room.inputs, pairs), words(room.places, pairs)
    pair_gains = floats(room.pair_gains, pairs)
    if not routed:
        for token in range(count):
            chosen[token], gains[token] = 0, np.float32(1)
    for member in range(members + 1):
        begins[member] = 0
    for choice in range(count * choices):
        begins[chosen[choice]] += 1
    if fields[SHARED_EXPERT]:
        begins[members - 1] = count
    before = 0
    for member in range(members + 1):
        own_pairs = begins[member]
        begins[member] = before
        before += own_pairs
    width = fields[HIDDEN] * element_bytes(dtype)
    for choice in range(count * (choices + fields[SHARED_EXPERT])):
        token = choice // choices if choice < count * choices else choice - count * choices
        member = chosen[choice] if choice < count * choices else members - 1
        pair = begins[member]
        begins[member] += 1
        tokens[pair], inputs[pair] = token, normed + token * width
        places[pair] = room.activations + pair * fields[WIDEST] * element_bytes(dtype)
        pair_gains[pair] = gains[choice] if choice < count * choices else np.float32(1)
    for member in range(members, 0, -1):
        begins[member] = begins[member - 1]
    begins[0] = 0


@inline
def _expand(shared, own, fields, dtype, room, mine):
    """Gate and up of every pair. A unit is a block of rows of one member; members without pairs have none."""
    members = fields[ROUTED] + fields[SHARED_EXPERT]
    begins = words(room.begins, members + 1)
    units = 0
    for member in range(members):
        units += _gate_units(fields, begins, member)
    share(own, units)
    member, before = 0, 0
    unit = claim(shared, own)
    while unit >= 0:
        while unit >= before + _gate_units(fields, begins, member):
            before += _gate_units(fields, begins, member)
            member += 1
        _expand_rows(fields, begins, member, unit - before, dtype, room, mine)
        unit = claim(shared, own)
    meet(shared, own)


@inline
def _gate_units(fields, begins, member):
    if begins[member] == begins[member + 1]:
        return 0
    gate = matrix_at(fields, MATRICES + EXPERT_WORDS * member)
    return -(-gate.rows // rows_of_unit(gate))


@kernel
def _expand_rows(fields, begins, member, block, dtype, room, mine):
    """One block of rows of one member's gate and up, for all its pairs."""
    at = MATRICES + EXPERT_WORDS * member
    gate, up = matrix_at(fields, at), matrix_at(fields, at + MATRIX_WORDS)
    first = block * rows_of_unit(gate)
    last = min(gate.rows, first + rows_of_unit(gate))
    stride = 4 * (last - first)
    inputs, places = words(room.inputs, begins[member + 1]), words(room.places, begins[member + 1])
    for begin in range(begins[member], begins[member + 1], VECTORS_AT_ONCE):
        count = min(VECTORS_AT_ONCE, begins[member + 1] - begin)
        ups = mine + count * stride
        multiply_rows(gate, first, last, inputs[begin:], dtype, count, mine, stride)
        multiply_rows(up, first, last, inputs[begin:], dtype, count, ups, stride)
        for i in range(count):
            values = floats(mine + i * stride, last - first)
            gate_by(fields[ACTIVATION], values, floats(ups + i * stride, last - first), last - first, dtype)
            narrow(values, last - first, places[begin + i] + first * element_bytes(dtype), dtype)


@inline
def _contract(shared, own, fields, count, dtype, room, mine, out):
    """Down of every pair, and the sum of each token's pairs. A unit is DOWN_ROWS elements of all outputs."""
    share(own, -(-fields[HIDDEN] // DOWN_ROWS))
    unit = claim(shared, own)
    while unit >= 0:
        _contract_rows(fields, unit * DOWN_ROWS, count, dtype, room, mine, out)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def _contract_rows(fields, first, count, dtype, room, mine, out):
    """Output elements ``first`` to at most ``first + DOWN_ROWS - 1`` of all tokens."""
    members = fields[ROUTED] + fields[SHARED_EXPERT]
    begins = words(room.begins, members + 1)
    tokens, places = words(room.tokens, begins[members]), words(room.places, begins[members])
    gains = floats(room.pair_gains, begins[members])
    rows = min(DOWN_ROWS, fields[HIDDEN] - first)
    totals = floats(mine + 4 * VECTORS_AT_ONCE * DOWN_ROWS, count * rows)
    for i in range(count * rows):
        totals[i] = np.float32(0)
    for member in range(members):
        down = matrix_at(fields, MATRICES + EXPERT_WORDS * member + 2 * MATRIX_WORDS)
        for begin in range(begins[member], begins[member + 1], VECTORS_AT_ONCE):
            pairs = min(VECTORS_AT_ONCE, begins[member + 1] - begin)
            multiply_rows(down, first, first + rows, places[begin:], dtype, pairs, mine, 4 * rows)
            products = floats(mine, pairs * rows)
            round_to(products, pairs * rows, dtype)
            for i in range(pairs):
                gain, total = gains[begin + i], tokens[begin + i] * rows
                for row in range(rows):
                    totals[total + row] += products[i * rows + row] * gain
    size = element_bytes(dtype)
    for token in range(count):
        place = out + (token * fields[HIDDEN] + first) * size
        narrow(totals[token * rows :], rows, place, dtype)
