"""The attention half of a layer in pieces, for a pass whose context lies on several devices: see stages.py.

Piece 0 is its begin, at home. Then in each round, on all devices together, their parts (odd pieces), and at
home the merge (even pieces), the last of which ends the half. The pieces share the body's HALF_ROOM: between
them, teams run other micro-batches in their own.
"""

from __future__ import annotations

from crosspool.kernels.numba.compile import Entry
from crosspool.kernels.numba.gqa import gqa_begin, gqa_end, gqa_part
from crosspool.kernels.numba.intrinsics import words
from crosspool.kernels.numba.mla import mla_begin, mla_end, mla_part
from crosspool.kernels.numba.team import OWN_WORDS
from crosspool.workers.resident.body_words import HALF_ROOM, NORMED, ROUNDS, STREAM, body_at
from crosspool.workers.resident.model_words import ATTENTION, ATTENTION_WORDS, FFN_NORM, layer_at, model_at
from crosspool.workers.resident.passes import kv_of, pass_of, spread_of
from crosspool.workers.resident.stages import begin_half, norm_all


@Entry
def gqa_spread_stage(shared, own, room, mine, model_address, body_address, layer, part, piece):
    """One piece of the attention half of a layer with grouped-query attention."""
    team, model, body = words(own, OWN_WORDS), model_at(model_address), body_at(body_address)
    place = layer_at(model, layer)
    fields, kept = words(place[ATTENTION], place[ATTENTION_WORDS]), body[HALF_ROOM]
    if piece == 0:
        begin_half(shared, team, model, body, place, layer, mine)
    batch, kv, spread = pass_of(model, body), kv_of(model, body, place), spread_of(body, (piece - 1) // 2)
    if piece == 0:
        gqa_begin(shared, team, fields, body[NORMED], batch, kv, kept, mine)
    elif piece % 2 == 1:
        gqa_part(shared, team, fields, batch, kv, spread, part, kept, mine)
    else:
        gqa_end(shared, team, fields, batch, kv, spread, kept, mine, body[STREAM])
    if piece == 2 * body[ROUNDS]:
        norm_all(shared, team, model, body, place[FFN_NORM], mine)
    return 0


@Entry
def mla_spread_stage(shared, own, room, mine, model_address, body_address, layer, part, piece):
    """One piece of the attention half of a layer with latent attention."""
    team, model, body = words(own, OWN_WORDS), model_at(model_address), body_at(body_address)
    place = layer_at(model, layer)
    fields, kept = words(place[ATTENTION], place[ATTENTION_WORDS]), body[HALF_ROOM]
    if piece == 0:
        begin_half(shared, team, model, body, place, layer, mine)
    batch, kv, spread = pass_of(model, body), kv_of(model, body, place), spread_of(body, (piece - 1) // 2)
    if piece == 0:
        mla_begin(shared, team, fields, body[NORMED], batch, kv, kept, mine)
    elif piece % 2 == 1:
        mla_part(shared, team, fields, batch, kv, spread, part, kept, mine)
    else:
        mla_end(shared, team, fields, batch, kv, spread, kept, mine, body[STREAM])
    if piece == 2 * body[ROUNDS]:
        norm_all(shared, team, model, body, place[FFN_NORM], mine)
    return 0
