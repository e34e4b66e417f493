"""The fluid executor keeps the executors' contract: tokens, boundaries, and one end of each grant."""

from __future__ import annotations

import pytest

from crosspool.core.batch import Grant, Phase, RetiredEvent, Row, TokenChoice, TokenEvent
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
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
            Rates(1000.0, Nanoseconds(STEP)),
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
    with pytest.raises(InvariantError, match="a grant ends at 300000000"):
        fluid.executor.advance_to(400_000_000)
    fluid.executor.wait(10.0)
    assert fluid.clock.now() == 300_000_000
    assert fluid.tokens() == ([(0, None)], 1)
    fluid.executor.wait(1.0)
    assert fluid.clock.now() == 1_300_000_000
