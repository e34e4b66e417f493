"""Running a request for the routes: its timers, and its end when the client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from crosspool.core.errors import CrossPoolError, InvalidRequestError, OverloadedError
from crosspool.core.request import FinishReason
from crosspool.llm import OutputLogprobs, Submission, TextDelta
from crosspool.llm.arrivals import Arrivals
from crosspool.metrics.latency import SequenceTimer
from crosspool.server.config import LimitsConfig
from crosspool.server.openai_responses import PromptTokensDetails, Usage
from crosspool.server.state import ServerState
from crosspool.server.time_limits import in_time

T = TypeVar("T")

logger = logging.getLogger(__name__)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled, with ClientDisconnect raised, when the client leaves."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def prepared(state: ServerState, request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work`` on a request's text.

    Raises OverloadedError if it takes too long, ClientDisconnect, and what ``work`` raises.
    """
    limits = state.config.limits
    patience = min(limits.first_token_timeout, limits.total_timeout)
    try:
        async with asyncio.timeout(patience) as limit:
            return await unless_disconnected(request, work)
    except TimeoutError:
        if not limit.expired():
            raise
        raise OverloadedError(f"the prompt could not be prepared within {patience:g} s") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_choices(limits: LimitsConfig, prompts: int, n: int) -> None:
    """Raises InvalidRequestError for more choices than the queue of a model could ever take at once."""
    if prompts * n > limits.max_choices:
        raise InvalidRequestError(
            f"{prompts} prompts with n {n} are {prompts * n} choices, "
            f"at most {limits.max_choices} are made in one request",
            parameter="n",
        )


async def run(
    state: ServerState, submissions: Sequence[Submission], arrival: float
) -> AsyncGenerator[list[TextDelta], None]:
    """The deltas of all choices, timed for /metrics: each time all that have come since the last time.
    ``arrival`` is by the clock of the event loop.

    They are taken from the engine as they come, however slowly the client reads.

    Raises OverloadedError when a time limit is passed, CrossPoolError when the engine fails on a request, and
    what AsyncLLM.stream raises.
    """
    arrivals: Arrivals[TextDelta | None] = Arrivals()
    taking = asyncio.create_task(_take(state, submissions, arrival, arrivals.put))
    taking.add_done_callback(lambda _: arrivals.put(None))
    try:
        while True:
            items = await arrivals.take()
            deltas = [delta for delta in items if delta is not None]
            if deltas:
                yield deltas
            if len(deltas) < len(items):
                taking.result()
                return
    finally:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)


async def _take(
    state: ServerState,
    submissions: Sequence[Submission],
    arrival: float,
    deliver: Callable[[TextDelta], None],
) -> None:
    clock = asyncio.get_running_loop().time
    timers = [
        SequenceTimer(state.metrics.latencies, submission.model.name, arrival)
        for submission in submissions
        for _ in submission.requests
    ]
    async with (
        in_time(state.config.limits, len(timers), arrival) as limit,
        aclosing(state.llm.stream(*submissions)) as deltas,
    ):
        async for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                logger.error("the engine failed on a request: %s", delta.error)
                raise CrossPoolError("the engine failed on this request")
            now = clock()
            limit.note(delta.index, now)
            if delta.token_ids:
                timers[delta.index].delivered(now)
            if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                timers[delta.index].ended(now)
            deliver(delta)


@dataclass(slots=True)
class Choice:
    """A whole choice, put together from its deltas. ``logprobs`` is None if they were not asked for."""

    text: list[str] = field(default_factory=list)
    logprobs: list[OutputLogprobs] | None = None
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def take(self, delta: TextDelta) -> None:
        self.text.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        self.output_tokens = delta.output_tokens
        self.cached_tokens = delta.cached_tokens
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


async def collect(deltas: AsyncGenerator[list[TextDelta], None], choices: int) -> list[Choice]:
    """All choices, whole."""
    collected = [Choice() for _ in range(choices)]
    async with aclosing(deltas):
        async for several in deltas:
            for delta in several:
                collected[delta.index].take(delta)
    return collected


async def begin(request: Request, deltas: AsyncGenerator[T, None]) -> T:
    """The first deltas. They are waited for, so that an error before them can still become an HTTP status."""

    async def first() -> T:
        return await anext(deltas)

    return await unless_disconnected(request, first())


def usage(submissions: Sequence[Submission], choices: Sequence[Choice | TextDelta]) -> Usage:
    """From every choice, or its last delta, in order. Prompts count once, however many choices were made from
    them: what a choice took over from another of the same prompt is not counted as cached."""
    prompt_tokens = sum(len(submission.prompt_token_ids) for submission in submissions)
    output_tokens = sum(choice.output_tokens for choice in choices)
    cached_tokens, left = 0, iter(choices)
    for submission in submissions:
        cached_tokens += min(choice.cached_tokens for choice in islice(left, len(submission.requests)))
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=output_tokens,
        total_tokens=prompt_tokens + output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )
