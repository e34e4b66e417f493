"""A pass of a micro-batch in compiled code: which rows are in it, and what becomes of them at its end."""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.attention_spread import Spread
from crosspool.kernels.numba.batch import KvPlace, Pass, rope_angles
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes
from crosspool.kernels.numba.intrinsics import address_of, floats, halves, load_acquire, words
from crosspool.workers.resident.body_words import (
    ALIVE,
    ARENA,
    BLOCKS,
    CHOICE,
    CHOOSERS,
    COS,
    COUNT,
    DONE,
    ENDED,
    FIRST,
    FIRSTS,
    GROUPS,
    INPUTS,
    KV_PARTS,
    MADE,
    NEXT,
    PAGE_BYTES,
    PASS_CHOOSERS,
    PASS_QUERIES,
    PASS_ROWS,
    REMAINING,
    ROUNDS,
    ROW_BLOCKS,
    ROW_INPUTS,
    ROW_NUMBERS,
    ROW_OF,
    ROW_TABLES,
    ROWS,
    SIN,
    STARTS,
    STEPS,
    STOP_COUNT,
    STOPS,
    STOPS_AFTER,
    STREAM,
    TABLES,
    USED_UP,
    body_at,
    row_at,
)
from crosspool.workers.resident.model_words import (
    DTYPE,
    EMBEDDING,
    FREQUENCIES,
    HIDDEN,
    KV_GROUP,
    KV_OFFSET,
    KV_WINDOW,
    ROTARY_GAIN,
    ROTARY_PAIRS,
    TOKENS_PER_PAGE,
)


@inline
def goes_on(row):
    """Whether a row (its words) wants another pass."""
    return row[DONE] == 0 and load_acquire(address_of(row) + 8 * ALIVE) != 0


@kernel
def rows_that_go_on(address):
    """How many rows of the body at an address want another pass."""
    body = body_at(address)
    count = 0
    for number in range(body[ROWS]):
        count += goes_on(row_at(body, number))
    return count


@kernel
def begin_pass(address):
    """One thread, before the first layer: the rows that go on make up the pass. Returns how many there
    are."""
    body = body_at(address)
    groups, lists = body[GROUPS], body[GROUPS] * body[KV_PARTS]
    numbers, firsts = words(body[ROW_NUMBERS], body[ROWS]), words(body[FIRSTS], body[ROWS])
    starts, tables = words(body[STARTS], body[ROWS] + 1), words(body[TABLES], body[ROWS] * groups)
    blocks = words(body[BLOCKS], body[ROWS] * lists)
    rows, queries = 0, 0
    starts[0] = 0
    for number in range(body[ROWS]):
        row = row_at(body, number)
        if not goes_on(row):
            continue
        numbers[rows], firsts[rows] = number, row[FIRST]
        own = words(row[ROW_TABLES], groups)
        for group in range(groups):
            tables[rows * groups + group] = own[group]
        own_blocks = words(row[ROW_BLOCKS], lists)
        for i in range(lists):
            blocks[rows * lists + i] = own_blocks[i]
        tokens, end = words(row[ROW_INPUTS], row[COUNT]), queries + row[COUNT]
        inputs, row_of = words(body[INPUTS], end), words(body[ROW_OF], end)
        for i in range(row[COUNT]):
            inputs[queries + i], row_of[queries + i] = tokens[i], rows
        queries = end
        rows += 1
        starts[rows] = queries
    body[PASS_ROWS], body[PASS_QUERIES] = rows, queries
    body[PASS_CHOOSERS] = _choosers(body)
    return rows


@inline
def _choosers(body):
    """Note the last query of each row that chooses a token. Returns how many there are."""
    numbers, starts = words(body[ROW_NUMBERS], body[PASS_ROWS]), words(body[STARTS], body[PASS_ROWS] + 1)
    choosers = words(body[CHOOSERS], body[PASS_ROWS])
    count = 0
    for place in range(body[PASS_ROWS]):
        if row_at(body, numbers[place])[CHOICE] != 0:
            choosers[count] = starts[place + 1] - 1
            count += 1
    return count


@inline
def chooser(body, number):
    """The words of the row that chooser ``number`` is of."""
    row_of, numbers = words(body[ROW_OF], body[PASS_QUERIES]), words(body[ROW_NUMBERS], body[PASS_ROWS])
    return row_at(body, numbers[row_of[words(body[CHOOSERS], number + 1)[number]]])


@inline
def end_row(row):
    """A row has made its NEXT token: it becomes the next input, unless it was the last (core/batch.py
    row_after). A row that chose nothing has read its tokens and is done."""
    row[FIRST] += row[COUNT]
    row[COUNT], row[ROW_INPUTS] = 1, address_of(row) + 8 * NEXT
    row[MADE] += 1
    if row[MADE] == row[STEPS]:
        row[DONE] = USED_UP
    if row[MADE] == row[REMAINING]:
        row[DONE] = ENDED
    if row[MADE] > row[STOPS_AFTER]:
        stops = words(row[STOPS], row[STOP_COUNT])
        for i in range(row[STOP_COUNT]):
            if stops[i] == row[NEXT]:
                row[DONE] = ENDED


@inline
def pass_of(model, body):
    """The pass as attention sees it."""
    rows, queries, half = body[PASS_ROWS], body[PASS_QUERIES], model[ROTARY_PAIRS]
    return Pass(
        rows,
        queries,
        model[DTYPE],
        model[HIDDEN],
        words(body[STARTS], rows + 1),
        words(body[FIRSTS], rows),
        words(body[ROW_OF], queries),
        words(body[TABLES], rows * body[GROUPS]),
        body[GROUPS],
        floats(body[COS], queries * half),
        floats(body[SIN], queries * half),
        half,
    )


@inline
def spread_of(body, number):
    """How devices share the pass's context, in round ``number``."""
    parts = body[KV_PARTS]
    lists = words(body[BLOCKS], body[PASS_ROWS] * body[GROUPS] * parts)
    return Spread(parts, body[ROUNDS], number, lists)


@inline
def kv_of(model, body, layer):
    """Where the KV of a layer (its words) lies."""
    return KvPlace(
        body[ARENA],
        body[PAGE_BYTES],
        layer[KV_OFFSET],
        model[TOKENS_PER_PAGE],
        layer[KV_GROUP],
        layer[KV_WINDOW],
    )


@kernel
def embed(model, body, query):
    """One query's embedding into the residual stream, and its rotary angles."""
    row_of, starts = words(body[ROW_OF], query + 1), words(body[STARTS], body[PASS_ROWS] + 1)
    row, half = row_of[query], model[ROTARY_PAIRS]
    position = words(body[FIRSTS], row + 1)[row] + query - starts[row]
    cos, sin = floats(body[COS] + 4 * query * half, half), floats(body[SIN] + 4 * query * half, half)
    gain = model.view(np.float64)[ROTARY_GAIN]
    rope_angles(position, floats(model[FREQUENCIES], half), gain, cos, sin)
    width = model[HIDDEN] * element_bytes(model[DTYPE])
    source = words(body[INPUTS], query + 1)[query] * width + model[EMBEDDING]
    copy_bytes(source, body[STREAM] + query * width, width)


@inline
def copy_bytes(source, target, count):
    """``count`` bytes from one address to another; 2 at a time, as every model dtype has them."""
    read, written = halves(source, count // 2), halves(target, count // 2)
    for i in range(count // 2):
        written[i] = read[i]
