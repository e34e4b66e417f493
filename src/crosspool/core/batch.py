"""The plain-data contract between the scheduler and whoever executes micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from crosspool.core.copies import CopiedEvent
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, PageId, RequestId
from crosspool.core.request import FinishReason, TokenLogprobs
from crosspool.core.sampling import SamplingParams


class Phase(IntEnum):
    """What a micro-batch does: continue sequences token by token, or read prompts chunk by chunk."""

    DECODE = 0
    PREFILL = 1


class Half(IntEnum):
    """The two halves of a layer, and so the two sides of the pipeline."""

    ATTENTION = 0
    FFN = 1


class Piece(IntEnum):
    """What of an attention half a task is: all of it, or, where rows have pages on several KV devices, its
    begin at home, one device's part of the context, or its end at home."""

    WHOLE = 0
    BEGIN = 1
    PART = 2
    END = 3

    @property
    def begins(self) -> bool:
        """Whether nothing of its half comes before it."""
        return self in (Piece.WHOLE, Piece.BEGIN)

    @property
    def ends(self) -> bool:
        """Whether nothing of its half comes after it."""
        return self in (Piece.WHOLE, Piece.END)


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """How one row's next token is chosen and when the row stops.

    ``output_index`` is the index of the next output token (0 is the first), which with ``seed`` fixes the
    random draw. ``remaining`` is how many tokens the request may still make. A stop token is not chosen
    before ``params.min_tokens`` outputs. ``prompt`` and ``output`` are filled only for penalties.
    """

    params: SamplingParams
    seed: int
    output_index: int
    remaining: int
    stop_token_ids: frozenset[int]
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a micro-batch.

    ``tokens`` are the inputs at positions ``start`` .. ``start + len(tokens) - 1``; KV for every position
    before ``start`` is already in the pages (or out of the window). ``pages`` holds one page table per layer
    group, enough for all steps granted; entry i holds positions ``i * tokens_per_page`` onwards, NULL_PAGE
    where a window group has given the page back. ``choice`` None: a prompt chunk that is not the last.
    ``steps`` is how many tokens this row may make in the grant (0 without a choice).
    """

    request: RequestId
    start: int
    tokens: tuple[int, ...]
    pages: tuple[tuple[PageId, ...], ...]
    choice: TokenChoice | None
    steps: int


@dataclass(frozen=True, slots=True)
class Grant:
    """A micro-batch and the right to run it: up to ``steps`` passes through the layers.

    A prefill has one pass. A decode repeats: each row's new token is the next pass's input, until every row
    has stopped or used its steps. Times are on the engine's clock and feed the order rule (core/pick.py):
    ``start_by`` is the latest time at which the first pass may begin and still be in time; for a later pass
    it is the time of the token before plus ``interval``. ``layer_cost`` is the predicted time of one layer
    task of this micro-batch. ``kv_device`` is the home of its rows, where their attention side runs;
    ``elsewhere`` are the other devices, in order, that hold pages of some row (most grants have none).
    """

    id: GrantId
    model: ModelIndex
    phase: Phase
    kv_device: KvDevice
    rows: tuple[Row, ...]
    steps: int
    start_by: Nanoseconds
    interval: Nanoseconds
    layer_cost: Nanoseconds
    elsewhere: tuple[KvDevice, ...] = ()


class TokenEvent(NamedTuple):
    """One new token of one row. ``finish`` says that the row will make no more; ``delivered`` that whoever
    reads the pipe of Executor.stream_to has the token already."""

    grant: GrantId
    request: RequestId
    token: int
    finish: FinishReason | None
    logprobs: TokenLogprobs | None = None
    delivered: bool = False


@dataclass(frozen=True, slots=True)
class RetiredEvent:
    """A grant is over: its workers hold none of its pages any more. All its tokens came before.

    ``error`` says why the micro-batch failed; its rows then have no valid KV for this grant.
    ``layer_times`` are the measured mean spans of its (attention, FFN) layer tasks, for calibration.
    """

    grant: GrantId
    layer_times: tuple[Nanoseconds, Nanoseconds]
    error: str | None = None


Event = TokenEvent | RetiredEvent | CopiedEvent


def row_after(row: Row, made: int, token: int) -> tuple[FinishReason | None, bool]:
    """What follows from a row's new token: why its request ends, if it does, and whether the row leaves the
    grant.

    ``made`` counts the tokens of this row in this grant, the new one included.
    """
    choice = row.choice
    assert choice is not None
    if token in choice.stop_token_ids and choice.output_index + made > choice.params.min_tokens:
        return FinishReason.STOP, True
    if made == choice.remaining:
        return FinishReason.LENGTH, True
    return None, made == row.steps
