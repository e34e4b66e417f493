"""The three stages of a pass as compiled code: attention half, FFN half, head. All threads of a team
together.

Each is an Entry that the loop of loop.py calls by its address, with ``shared``, ``own``, ``room`` and
``mine`` as in kernels/numba/team.py and ffn.py, the addresses of model and body, the layer, which part of a
stage that several teams share, and which piece of the layer. They return when every thread is done.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.choice import choose
from crosspool.kernels.numba.compile import Entry, inline, kernel
from crosspool.kernels.numba.elements import element_bytes, narrow, round_to, widen
from crosspool.kernels.numba.ffn import ffn_half
from crosspool.kernels.numba.gqa import gqa_half
from crosspool.kernels.numba.head import HEAD_WORDS, head, head_room_bytes
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.mla import mla_half
from crosspool.kernels.numba.norm import LANES, rms_norm
from crosspool.kernels.numba.team import OWN_WORDS, claim, meet, share
from crosspool.workers.resident.body_words import (
    CHOICE,
    CHOICE_LENGTH,
    CHOOSERS,
    NEXT,
    NORMED,
    OUTPUTS,
    PARTS,
    PASS_CHOOSERS,
    PASS_QUERIES,
    STREAM,
    body_at,
)
from crosspool.workers.resident.model_words import (
    ATTENTION,
    ATTENTION_WORDS,
    DTYPE,
    EPSILON,
    FFN_NORM,
    FFNS,
    HEAD,
    HIDDEN,
    INPUT_NORM,
    VOCABULARY,
    layer_at,
    model_at,
)
from crosspool.workers.resident.passes import chooser, embed, kv_of, pass_of


@Entry
def gqa_stage(shared, own, room, mine, model_address, body_address, layer, part, piece):
    """The attention half of a layer with grouped-query attention."""
    team, model, body = words(own, OWN_WORDS), model_at(model_address), body_at(body_address)
    place = layer_at(model, layer)
    begin_half(shared, team, model, body, place, layer, mine)
    fields, batch, kv = (
        words(place[ATTENTION], place[ATTENTION_WORDS]),
        pass_of(model, body),
        kv_of(model, body, place),
    )
    gqa_half(shared, team, fields, body[NORMED], batch, kv, room, mine, body[STREAM])
    norm_all(shared, team, model, body, place[FFN_NORM], mine)
    return 0


@Entry
def mla_stage(shared, own, room, mine, model_address, body_address, layer, part, piece):
    """The attention half of a layer with latent attention."""
    team, model, body = words(own, OWN_WORDS), model_at(model_address), body_at(body_address)
    place = layer_at(model, layer)
    begin_half(shared, team, model, body, place, layer, mine)
    fields, batch, kv = (
        words(place[ATTENTION], place[ATTENTION_WORDS]),
        pass_of(model, body),
        kv_of(model, body, place),
    )
    mla_half(shared, team, fields, body[NORMED], batch, kv, room, mine, body[STREAM])
    norm_all(shared, team, model, body, place[FFN_NORM], mine)
    return 0


@Entry
def ffn_stage(shared, own, room, mine, model_address, body_address, layer, part, piece):
    """One device's part of a layer's FFN."""
    team, model, body = words(own, OWN_WORDS), model_at(model_address), body_at(body_address)
    row = words(layer_at(model, layer)[FFNS] + 16 * part, 2)
    count, dtype = body[PASS_QUERIES], model[DTYPE]
    out = body[OUTPUTS] + part * count * model[HIDDEN] * element_bytes(dtype)
    ffn_half(shared, team, words(row[0], row[1]), body[NORMED], count, dtype, room, mine, out)
    return 0


@Entry
def head_stage(shared, own, room, mine, model_address, body_address, layer, part, piece):
    """The end of a pass: a NEXT token for each row that chooses, negative if its logits hold no largest."""
    team, model, body = words(own, OWN_WORDS), model_at(model_address), body_at(body_address)
    count = body[PASS_CHOOSERS]
    if count == 0:
        return 0
    queries = words(body[CHOOSERS], count)
    share(team, count)
    number = claim(shared, team)
    while number >= 0:
        _add_outputs(model, body, queries[number], mine)
        number = claim(shared, team)
    meet(shared, team)
    logits, stride = room + head_room_bytes(model[HIDDEN], count), 4 * model[VOCABULARY]
    fields = words(model[HEAD], HEAD_WORDS)
    head(shared, team, fields, body[STREAM], queries, count, model[DTYPE], room, mine, logits)
    share(team, count)
    number = claim(shared, team)
    while number >= 0:
        row = chooser(body, number)
        choice = words(row[CHOICE], row[CHOICE_LENGTH])
        row[NEXT] = choose(choice, logits + number * stride, model[VOCABULARY], mine)
        number = claim(shared, team)
    meet(shared, team)
    return 0


@inline
def begin_half(shared, team, model, body, place, layer, mine):
    """The residual stream as the layers before have left it, and its norm."""
    share(team, body[PASS_QUERIES])
    query = claim(shared, team)
    while query >= 0:
        if layer == 0:
            embed(model, body, query)
        else:
            _add_outputs(model, body, query, mine)
        _norm(model, body, query, place[INPUT_NORM], mine)
        query = claim(shared, team)
    meet(shared, team)


@inline
def norm_all(shared, team, model, body, weight, mine):
    share(team, body[PASS_QUERIES])
    query = claim(shared, team)
    while query >= 0:
        _norm(model, body, query, weight, mine)
        query = claim(shared, team)
    meet(shared, team)


@kernel
def _norm(model, body, query, weight, mine):
    """One query's norm of the residual stream, to NORMED."""
    hidden, dtype = model[HIDDEN], model[DTYPE]
    values, scratch = floats(mine, hidden), floats(mine + 4 * hidden, hidden + LANES)
    offset = query * hidden * element_bytes(dtype)
    widen(body[STREAM] + offset, dtype, hidden, values)
    rms_norm(values, hidden, weight, model.view(np.float64)[EPSILON], dtype, scratch)
    narrow(values, hidden, body[NORMED] + offset, dtype)


@kernel
def _add_outputs(model, body, query, mine):
    """Add what the FFN's parts have made of one query, in their order, to the residual stream."""
    hidden, dtype = model[HIDDEN], model[DTYPE]
    total, other = floats(mine, hidden), floats(mine + 4 * hidden, hidden)
    size = element_bytes(dtype)
    offset, part_bytes = query * hidden * size, body[PASS_QUERIES] * hidden * size
    widen(body[OUTPUTS] + offset, dtype, hidden, total)
    for part in range(1, body[PARTS]):
        widen(body[OUTPUTS] + part * part_bytes + offset, dtype, hidden, other)
        for i in range(hidden):
            total[i] += other[i]
    round_to(total, hidden, dtype)
    widen(body[STREAM] + offset, dtype, hidden, other)
    for i in range(hidden):
        total[i] += other[i]
    narrow(total, hidden, body[STREAM] + offset, dtype)
