"""A micro-batch in memory: its rows, their page tables, and the hidden states on their way through the
layers.

The engine's thread makes a body for each grant and keeps it until the grant has retired. The words of a pass
(from PASS_ROWS on, and the arrays they lead to) are made anew by the attention team for every pass, out of
the rows that are still going.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from crosspool.core.batch import Grant, Row
from crosspool.core.kv_layout import KvLayout
from crosspool.core.request import TokenLogprobs
from crosspool.kernels.choice_fields import read_report
from crosspool.workers.grant_rows import check_pages, describe_row_choice, tokens_of
from crosspool.workers.resident.body_words import (
    ALIVE,
    ARENA,
    BLOCKS,
    BODY_WORDS,
    CHOICE,
    CHOICE_LENGTH,
    CHOOSERS,
    COS,
    COUNT,
    DONE,
    FIRST,
    FIRSTS,
    GROUPS,
    HALF_ROOM,
    INPUTS,
    KV_PARTS,
    MADE,
    NORMED,
    OUTPUTS,
    PAGE_BYTES,
    PARTS,
    PIPED,
    REMAINING,
    ROUNDS,
    ROW_BLOCKS,
    ROW_INPUTS,
    ROW_NUMBERS,
    ROW_OF,
    ROW_TABLE,
    ROW_TABLES,
    ROW_WORDS,
    ROWS,
    SIN,
    STARTS,
    STEPS,
    STOP_COUNT,
    STOPS,
    STOPS_AFTER,
    STREAM,
    TABLES,
)
from crosspool.workers.resident.control import NO_REQUEST, new_bytes
from crosspool.workers.resident.model import ResidentModel
from crosspool.workers.resident.spread import SpreadContext

CACHE_LINE = 64


class Body:
    """The memory of one grant. ``memory`` is uint8 of ``body_bytes`` at least and is used by nobody else.

    With ``piped``, tokens without log-probabilities go into the pipe of Executor.stream_to.
    """

    def __init__(
        self,
        grant: Grant,
        model: ResidentModel,
        arena: int,
        page_bytes: int,
        parts: int,
        spread: SpreadContext | None,
        memory: np.ndarray,
        *,
        piped: bool = False,
    ) -> None:
        self.memory = memory
        self.address = int(memory.ctypes.data)
        self._place = 0
        self._choices: list[np.ndarray | None] = []
        tokens, rows, groups = tokens_of(grant), len(grant.rows), len(model.layout.groups)
        _, words = self._take(BODY_WORDS)
        row_table, row_words = self._take(rows * ROW_WORDS)
        self._rows = row_words.reshape(rows, ROW_WORDS)
        words[ROWS], words[GROUPS], words[PARTS] = rows, groups, parts
        words[ARENA], words[PAGE_BYTES], words[ROW_TABLE] = arena, page_bytes, row_table
        for field, count in (
            (ROW_NUMBERS, rows),
            (STARTS, rows + 1),
            (FIRSTS, rows),
            (ROW_OF, tokens),
            (TABLES, rows * groups),
            (INPUTS, tokens),
            (CHOOSERS, rows),
        ):
            words[field] = self._room(8 * count)
        for own, row in zip(self._rows, grant.rows, strict=True):
            self._put_row(own, row, model.layout, piped)
        pairs, hidden = model.spec.rope.dim // 2, tokens * model.spec.hidden_size * model.spec.dtype.bytes
        for field, size in (
            (COS, 4 * tokens * pairs),
            (SIN, 4 * tokens * pairs),
            (STREAM, hidden),
            (NORMED, hidden),
            (OUTPUTS, parts * hidden),
        ):
            words[field] = self._room(size, align=True)
        words[KV_PARTS] = 0
        if spread is not None:
            self._put_spread(words, spread, model.half_room_bytes(tokens, spread.states))

    def drop(self, row: int) -> None:
        """Let a row stop at the next boundary."""
        self._rows[row, ALIVE] = 0

    def logprobs(self, row: int, made: int) -> TokenLogprobs:
        """Of a row that asked for them, of its token number ``made`` (from 1) of this grant."""
        choice = self._choices[row]
        assert choice is not None
        return TokenLogprobs(*read_report(choice, made - 1))

    def _put_row(self, own: np.ndarray, row: Row, layout: KvLayout, piped: bool) -> None:
        check_pages(row, layout)
        own[[ALIVE, DONE, MADE]] = 1, 0, 0
        own[FIRST], own[COUNT], own[STEPS] = row.start, len(row.tokens), row.steps
        own[ROW_INPUTS] = self._fill(row.tokens)
        own[ROW_TABLES] = self._fill([self._fill(pages) for pages in row.pages])
        choice = None if row.choice is None else describe_row_choice(row.choice, row.steps)
        self._choices.append(choice)
        own[CHOICE] = 0
        if row.choice is not None and choice is not None:
            own[CHOICE], own[CHOICE_LENGTH] = choice.ctypes.data, len(choice)
            stops = row.choice.stop_token_ids
            own[STOPS], own[STOP_COUNT] = self._fill(list(stops)), len(stops)
            own[STOPS_AFTER] = row.choice.params.min_tokens - row.choice.output_index
            own[REMAINING] = row.choice.remaining
            own[PIPED] = row.request if piped and row.choice.params.logprobs is None else NO_REQUEST

    def _put_spread(self, words: np.ndarray, spread: SpreadContext, room: int) -> None:
        lists = len(spread.blocks[0]) * spread.parts
        words[KV_PARTS], words[ROUNDS] = spread.parts, spread.rounds
        words[BLOCKS] = self._room(8 * len(spread.blocks) * lists)
        for own, row in zip(self._rows, spread.blocks, strict=True):
            own[ROW_BLOCKS] = self._fill(
                [self._fill([len(blocks), *blocks]) for blocks in chain.from_iterable(row)]
            )
        words[HALF_ROOM] = self._room(room, align=True)

    def _fill(self, values: Sequence[int]) -> int:
        """The address of so many words with these values."""
        address, words = self._take(len(values))
        words[:] = values
        return address

    def _take(self, count: int) -> tuple[int, np.ndarray]:
        """The next ``count`` words, and their address."""
        address = self._room(8 * count)
        return address, self.memory[address - self.address : self._place].view(np.int64)

    def _room(self, size: int, *, align: bool = False) -> int:
        """The address of the next ``size`` bytes in whole words; ``align``: on cache lines of their own."""
        if align:
            self._place = -(-self._place // CACHE_LINE) * CACHE_LINE
        begin, self._place = self._place, self._place + -(-size // 8) * 8
        return self.address + begin


def body_bytes(grant: Grant, model: ResidentModel, parts: int, spread: SpreadContext | None) -> int:
    """How much memory a Body needs."""
    tokens, rows, groups = tokens_of(grant), len(grant.rows), len(model.layout.groups)
    words = BODY_WORDS + rows * (ROW_WORDS + 5 + 2 * groups) + 3 * tokens
    for row in grant.rows:
        words += sum(len(pages) for pages in row.pages)
        words += 0 if row.choice is None else len(row.choice.stop_token_ids)
    floats = 4 * tokens * model.spec.rope.dim
    hidden = tokens * model.spec.hidden_size * model.spec.dtype.bytes
    size = 8 * words + floats + (2 + parts) * hidden + 6 * CACHE_LINE
    if spread is not None:
        lists = 8 * (spread.words + 2 * rows * groups * spread.parts)
        size += lists + model.half_room_bytes(tokens, spread.states) + 2 * CACHE_LINE
    return size


class BodyMemory:
    """Gives out memory for bodies and takes it back: what was touched before is used again."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, size: int) -> np.ndarray:
        """uint8, ``size`` bytes or more."""
        size = 1 << max(12, (size - 1).bit_length())
        free = self._free.setdefault(size, [])
        return free.pop() if free else new_bytes(size)

    def give_back(self, memory: np.ndarray) -> None:
        self._free[len(memory)].append(memory)
