"""A grant as the device sees it: its words (kernels/triton/grant_words.py), written by the host and copied.

Every grant in flight has a span of device memory, and one of pinned host memory at the same offset: the
host's is what is copied, where its flags stay, and where reports of log-probabilities arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from crosspool.backends.device import Device
from crosspool.core.batch import Grant, Row
from crosspool.core.errors import InvariantError
from crosspool.core.ids import RequestId
from crosspool.core.kv_layout import KvLayout
from crosspool.core.request import TokenLogprobs
from crosspool.kernels.choice_fields import STOPS, read_report
from crosspool.kernels.triton import grant_words as words
from crosspool.kernels.triton.batch import elsewhere
from crosspool.kernels.triton.words import MODEL_WORDS
from crosspool.workers.cuda.room import ALIGNMENT
from crosspool.workers.grant_rows import check_pages, describe_row_choice


class Span(NamedTuple):
    """Bytes of grant memory."""

    begin: int
    size: int


class GrantMemory:
    """Device memory and its mirror in pinned host memory. Spans are given out first fit.

    ``mirror`` is how many bytes the host's is further on than the device's.
    """

    def __init__(self, device: Device, size: int) -> None:
        self.device = device.tensor((size,), torch.uint8)
        self.host = device.pinned((size,), torch.uint8)
        self.mirror = self.host.data_ptr() - self.device.data_ptr()
        self._free = [Span(0, size)]

    @property
    def free_bytes(self) -> int:
        return sum(span.size for span in self._free)

    def take(self, size: int) -> Span:
        """Raises InvariantError if there is no room: it is made for all that may be in flight."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        for place, (begin, free) in enumerate(self._free):
            if free >= size:
                self._free[place : place + 1] = [Span(begin + size, free - size)] if free > size else []
                return Span(begin, size)
        raise InvariantError(f"no {size:,} bytes for a grant: {self.free_bytes:,} are free, in pieces")

    def give_back(self, span: Span) -> None:
        self._free = sorted([*self._free, span])
        joined: list[Span] = []
        for begin, size in self._free:
            if joined and sum(joined[-1]) == begin:
                joined[-1] = Span(joined[-1].begin, joined[-1].size + size)
            else:
                joined.append(Span(begin, size))
        self._free = joined


def put_idle_grant(memory: GrantMemory, model: Sequence[int]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """A grant that is over, for launches that are to compute nothing. Returns its address, and what is to be
    copied where."""
    span = memory.take(8 * (words.GRANT_WORDS + words.FLAG_WORDS))
    host = memory.host[span.begin : sum(span)]
    header = host.numpy().view(np.int64)
    header[:] = 0
    header[:MODEL_WORDS], header[words.GRANT_OVER] = model, 1
    header[words.FLAGS] = host.data_ptr() + 8 * words.GRANT_WORDS
    target = memory.device[span.begin : sum(span)]
    return target.data_ptr(), target, host


class PackedGrant:
    """One grant, laid out in its span of host memory. Records say by its id whose they are, ``model`` is
    MODEL_WORDS words, ``home`` are the pages of its home and ``others`` those of the other devices that it
    names. Raises InvariantError if a page is on neither."""

    def __init__(
        self,
        grant: Grant,
        model: Sequence[int],
        layout: KvLayout,
        memory: GrantMemory,
        home: range,
        others: Sequence[range] = (),
    ) -> None:
        for row in grant.rows:
            check_pages(row, layout)
        tables = [_page_tables(row, home, others) for row in grant.rows]
        self._choices = [
            None if row.choice is None else describe_row_choice(row.choice, row.steps) for row in grant.rows
        ]
        self.span = memory.take(self._bytes(grant))
        self._memory = memory
        self._numbers = {row.request: number for number, row in enumerate(grant.rows)}
        self._place = self.span.begin
        self._choice_words: list[np.ndarray | None] = []
        header = self._take(words.GRANT_WORDS, np.int64)
        rows = self._take(len(grant.rows) * words.ROW_WORDS, np.int64)
        flags = [0, grant.steps, *(1 for _ in grant.rows)]
        self._flags, flags_at = self._fill(flags, np.int64)
        header[:] = 0
        header[:MODEL_WORDS] = model
        header[words.GRANT_ROWS], header[words.GRANT_STEPS] = len(grant.rows), grant.steps
        header[words.NUMBER], header[words.FLAGS] = grant.id, flags_at + memory.mirror
        for own, row, table, choice in zip(
            rows.reshape(-1, words.ROW_WORDS), grant.rows, tables, self._choices, strict=True
        ):
            self._put_row(own, row, table, choice)

    @property
    def address(self) -> int:
        """Of its words on the device."""
        return self._memory.device.data_ptr() + self.span.begin

    @property
    def source(self) -> torch.Tensor:
        """What is to be copied."""
        return self._memory.host[self.span.begin : self._place]

    @property
    def target(self) -> torch.Tensor:
        """Where to."""
        return self._memory.device[self.span.begin : self._place]

    def recall(self) -> None:
        self._flags[words.RECALLED] = 1

    def hold(self, steps: int) -> None:
        """Let loops make no pass when only so many of the grant's steps are left."""
        self._flags[words.HELD] = steps

    def drop(self, request: RequestId) -> None:
        """Let a row stop at the next step."""
        self._flags[words.WANTED + self._numbers[request]] = 0

    def logprobs(self, row: int, made: int) -> TokenLogprobs:
        """Of a row that asked for them, of its token number ``made`` (from 1) of this grant."""
        fields = self._choice_words[row]
        assert fields is not None
        return TokenLogprobs(*read_report(fields, made - 1))

    def _put_row(self, own: np.ndarray, row: Row, table: np.ndarray, choice: np.ndarray | None) -> None:
        own[:] = 0
        own[words.FIRST], own[words.COUNT], own[words.ROW_STEPS] = row.start, len(row.tokens), row.steps
        own[words.INPUTS] = self._fill(row.tokens, np.int32)[1]
        own[words.CHUNKS] = len(row.pages[0])
        own[words.TABLES] = self._fill(table, np.int32)[1]
        if row.choice is None or choice is None:
            self._choice_words.append(None)
            return
        fields, address = self._fill(choice, np.int64)
        self._choice_words.append(fields)
        own[words.CHOICE], own[words.REMAINING] = address, row.choice.remaining
        own[words.STOP_TOKENS] = address + 8 * int(choice[STOPS])
        own[words.STOP_TOKEN_COUNT] = len(row.choice.stop_token_ids)
        own[words.STOPS_AFTER] = row.choice.params.min_tokens - row.choice.output_index

    def _bytes(self, grant: Grant) -> int:
        size = 8 * (words.GRANT_WORDS + words.FLAG_WORDS + len(grant.rows) * (words.ROW_WORDS + 1))
        for row, choice in zip(grant.rows, self._choices, strict=True):
            size += 8 * (1 + len(row.tokens) // 2) + 8 * (1 + sum(len(pages) for pages in row.pages) // 2)
            size += 0 if choice is None else choice.nbytes
        return size

    def _fill(self, values: Sequence[int] | np.ndarray, dtype: type) -> tuple[np.ndarray, int]:
        """So many elements with these values, on the host, and their address on the device."""
        address = self._memory.device.data_ptr() + self._place
        array = self._take(len(values), dtype)
        array[:] = values
        return array, address

    def _take(self, count: int, dtype: type) -> np.ndarray:
        """The next elements of the span on the host, in whole words."""
        begin, size = self._place, count * np.dtype(dtype).itemsize
        self._place += -(-size // 8) * 8
        return self._memory.host[begin : begin + size].numpy().view(dtype)


def _page_tables(row: Row, home: range, others: Sequence[range]) -> np.ndarray:
    """A row's page tables, one after another, as its home knows them."""
    pages = np.fromiter(chain.from_iterable(row.pages), np.int32)
    here = _among(pages, home)
    known = here | (pages < 0)
    for other in others:
        known |= _among(pages, other)
    if not known.all():
        raise InvariantError(f"request {row.request} has pages on a KV device that its grant does not name")
    return np.where(here, pages - home.start, elsewhere(pages))


def _among(pages: np.ndarray, those: range) -> np.ndarray:
    return (pages >= those.start) & (pages < those.stop)


def most_grant_bytes(rows: int, entries: int, tokens: int, listed: int) -> int:
    """Of one grant of up to so many rows, with page tables of ``entries`` in all groups, ``tokens`` inputs in
    all rows, and ``listed`` words of how a row chooses."""
    per_row = 8 * (words.ROW_WORDS + 4 + listed) + 4 * entries
    return 8 * (words.GRANT_WORDS + words.FLAG_WORDS) + rows * per_row + 4 * tokens + ALIGNMENT
