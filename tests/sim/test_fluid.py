"""The fluid executor keeps the executors' contract: tokens, boundaries, and one end of each grant."""

from __future__ import annotations

import pytest

from crosspool.core.batch import Grant, Phase, RetiredEvent, Row, TokenChoice, TokenEvent
from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import (
    CopyId,
    GrantId,
    HostPage,
    KvDevice,
    ModelIndex,
    Nanoseconds,
    PageId,
    RequestId,
)
from crosspool.core.request import FinishReason
from crosspool.core.sampling import SamplingParams
from crosspool.sim.clock import VirtualClock
from crosspool.sim.fluid import FluidExecutor, Progress, Rates
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

STEP = 50_000_000
LENGTHS = {RequestId(0): 10, RequestId(1): 7, RequestId(2): 1000}


class Fluid:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.watched: list[tuple[Progress, list[int]]] = []
        self.executor = FluidExecutor(
            {ModelIndex(0): gqa_spec(layers=4)},
            self.clock,
            LENGTHS.__getitem__,
            Rates(1000.0, Nanoseconds(STEP), copy_bytes_per_second=1e6),
            lambda progress, made: self.watched.append((progress, made)),
        )

    def decode(self, grant: int, *rows: tuple[int, int], steps: int = 8, most: int = 1000) -> None:
        """Rows of (request, tokens made before)."""
        parts = tuple(
            Row(RequestId(r), 100 + made, (0,), (), choice(made, most - made), steps) for r, made in rows
        )
        self.executor.submit(make_grant(grant, Phase.DECODE, parts, steps))

    def tokens(self) -> tuple[list[tuple[int, FinishReason | None]], int]:
        """Each new token's request and end, and how many grants retired."""
        events = self.executor.poll()
        made = [(event.request, event.finish) for event in events if isinstance(event, TokenEvent)]
        return made, sum(isinstance(event, RetiredEvent) for event in events)


def copy_of(copy: int, size: int) -> PageCopy:
    pages, host_pages = (PageId(1),), (HostPage(1),)
    return PageCopy(CopyId(copy), RequestId(copy), Direction.OUT, pages, host_pages, size)


def choice(made: int, remaining: int) -> TokenChoice:
    return TokenChoice(SamplingParams(), 0, made, remaining, frozenset())


def make_grant(grant: int, phase: Phase, rows: tuple[Row, ...], steps: int) -> Grant:
    nothing = Nanoseconds(0)
    return Grant(GrantId(grant), ModelIndex(0), phase, KvDevice(0), rows, steps, nothing, nothing, nothing)


def test_rows_end_where_their_outputs_end() -> None:
    fluid = Fluid()
    fluid.decode(0, (0, 3), (1, 3))
    assert fluid.executor.next_end == 7 * STEP
    fluid.executor.advance_to(7 * STEP)
    tokens, retired = fluid.tokens()
    assert tokens == [*[(0, None)] * 6, (0, FinishReason.STOP), *[(1, None)] * 3, (1, FinishReason.STOP)]
    assert retired == 1 and fluid.watched[0][1] == [7, 4]
    fluid.decode(1, (2, 3), most=5)
    fluid.executor.advance_to(9 * STEP)
    assert fluid.tokens()[0] == [(2, None), (2, FinishReason.LENGTH)]


def test_a_recalled_decode_ends_at_its_next_step_with_the_tokens_made_until_then() -> None:
    fluid = Fluid()
    fluid.decode(0, (2, 3), (1, 3))
    fluid.executor.advance_to(2 * STEP + 1)
    fluid.executor.recall(GrantId(0))
    assert fluid.executor.next_end == 3 * STEP
    assert fluid.executor.computed(2 * STEP + 1) == {RequestId(2): 105, RequestId(1): 105}
    fluid.executor.advance_to(3 * STEP)
    assert fluid.tokens() == ([*[(2, None)] * 3, *[(1, None)] * 3], 1)
    assert fluid.executor.next_end is None
    fluid.executor.recall(GrantId(0))


def test_a_cancelled_row_makes_nothing_and_its_grant_still_retires() -> None:
    fluid = Fluid()
    fluid.decode(0, (2, 3), (0, 3))
    fluid.executor.advance_to(STEP // 2)
    fluid.executor.cancel(RequestId(0))
    assert fluid.executor.next_end == 8 * STEP
    fluid.executor.cancel(RequestId(2))
    assert fluid.executor.next_end == STEP
    fluid.executor.advance_to(STEP)
    assert fluid.tokens() == ([], 1)


def test_a_prompt_takes_as_long_as_its_longest_row() -> None:
    fluid = Fluid()
    rows = (
        Row(RequestId(0), 0, (0,) * 300, (), choice(0, 9), 1),
        Row(RequestId(1), 50, (0,) * 100, (), None, 0),
    )
    fluid.executor.submit(make_grant(0, Phase.PREFILL, rows, 1))
    fluid.executor.recall(GrantId(0))
    assert fluid.executor.computed(200_000_000) == {RequestId(0): 200, RequestId(1): 150}
    with pytest.raises(InvariantError, match="a grant or a copy ends at 300000000"):
        fluid.executor.advance_to(400_000_000)
    fluid.executor.wait(10.0)
    assert fluid.clock.now() == 300_000_000
    assert fluid.tokens() == ([(0, None)], 1)
    fluid.executor.wait(1.0)
    assert fluid.clock.now() == 1_300_000_000


def test_copies_follow_one_another_beside_grants() -> None:
    fluid = Fluid()
    fluid.decode(0, (2, 3), steps=2)
    fluid.executor.copy(copy_of(0, 60_000))
    fluid.executor.copy(copy_of(1, 40_000))
    assert fluid.executor.next_end == 60_000_000
    fluid.executor.advance_to(60_000_000)
    assert fluid.executor.poll() == [CopiedEvent(CopyId(0), Nanoseconds(60_000_000))]
    assert fluid.executor.next_end == 2 * STEP == 100_000_000
    fluid.executor.advance_to(100_000_000)
    events = fluid.executor.poll()
    assert CopiedEvent(CopyId(1), Nanoseconds(40_000_000)) in events
    assert sum(isinstance(event, RetiredEvent) for event in events) == 1
    fluid.clock.advance_to(200_000_000)
    fluid.executor.copy(copy_of(2, 1000))
    assert fluid.executor.next_end == 201_000_000
