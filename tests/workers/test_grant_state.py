"""One row on its way through a grant."""

from __future__ import annotations

import pytest
import torch

from crosspool.core.batch import Row, TokenChoice, TokenEvent
from crosspool.core.ids import GrantId, PageId, RequestId
from crosspool.core.request import FinishReason, TokenLogprobs
from crosspool.core.sampling import SamplingParams
from crosspool.kernels.reference.sampling import Chosen
from crosspool.workers.grant_state import ActiveRow, LayerTimes

pytestmark = pytest.mark.backend

GRANT = GrantId(7)


def active(
    params: SamplingParams, *, remaining: int = 9, steps: int = 3, stops: tuple[int, ...] = ()
) -> ActiveRow:
    choice = TokenChoice(
        params,
        seed=123,
        output_index=4,
        remaining=remaining,
        stop_token_ids=frozenset(stops),
        prompt=(1, 2),
        output=(3,) * 4,
    )
    pages = ((PageId(5), PageId(2)), (PageId(-1), PageId(0)))
    return ActiveRow(Row(RequestId(1), 5, (3,), pages, choice, steps))


def test_every_parameter_reaches_the_choice():
    params = SamplingParams(
        temperature=0.7,
        top_k=11,
        top_p=0.8,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logprobs=2,
        min_tokens=6,
        max_tokens=None,
    )
    choice = active(params, stops=(8, 9)).choice()
    assert (choice.seed, choice.index) == (123, 4)
    assert (choice.temperature, choice.top_k, choice.top_p, choice.min_p) == (0.7, 11, 0.8, 0.05)
    assert (choice.repetition_penalty, choice.presence_penalty, choice.frequency_penalty) == (1.2, 0.3, 0.4)
    assert sorted(choice.suppressed) == [8, 9] and choice.logprobs == 2
    logits = torch.ones(5)
    choice.history.penalise(logits, 2.0, 0.0, 0.0)
    assert logits.tolist() == [1.0, 0.5, 0.5, 0.5, 1.0]


def test_a_row_without_penalties_keeps_no_history():
    choice = active(SamplingParams(temperature=0)).choice()
    assert choice.history is None and choice.plain


def test_a_token_becomes_the_next_input():
    row = active(SamplingParams(temperature=0, min_tokens=6), stops=(8,))
    assert [table.tolist() for table in row.page_tables] == [[5, 2], [-1, 0]]
    assert (row.start, tuple(row.inputs)) == (5, (3,))
    assert row.take(Chosen(40), GRANT) == (TokenEvent(GRANT, RequestId(1), 40, None), False)
    assert (row.start, tuple(row.inputs), row.choice().index) == (6, (40,), 5)
    assert row.choice().suppressed == (8,)
    assert row.take(Chosen(41), GRANT) == (TokenEvent(GRANT, RequestId(1), 41, None), False)
    assert row.choice().suppressed == ()
    event, ended = row.take(Chosen(8), GRANT)
    assert (event.finish, ended) == (FinishReason.STOP, True)


def test_the_grant_or_the_request_may_be_used_up():
    row = active(SamplingParams(temperature=0), steps=1)
    assert row.take(Chosen(40), GRANT) == (TokenEvent(GRANT, RequestId(1), 40, None), True)
    row = active(SamplingParams(temperature=0), remaining=1)
    assert row.take(Chosen(40), GRANT) == (TokenEvent(GRANT, RequestId(1), 40, FinishReason.LENGTH), True)


def test_logprobs_are_in_the_event_if_asked_for():
    chosen = Chosen(40, -0.5, 2, ((41, -0.3),))
    event, _ = active(SamplingParams(temperature=0, logprobs=1)).take(chosen, GRANT)
    assert event.logprobs == TokenLogprobs(-0.5, 2, ((41, -0.3),))
    event, _ = active(SamplingParams(temperature=0)).take(chosen, GRANT)
    assert event.logprobs is None


def test_mean_times():
    times = LayerTimes()
    assert times.mean == 0
    times.add(10)
    times.add(21)
    assert times.mean == 15
