"""Running a request for the routes: its time limits, its timers, and its end when the client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from crosspool.core.errors import CrossPoolError, InvalidRequestError, OverloadedError
from crosspool.core.request import FinishReason
from crosspool.llm import OutputLogprobs, Submission, TextDelta
from crosspool.metrics.latency import SequenceTimer
from crosspool.server.config import LimitsConfig
from crosspool.server.openai_responses import Usage
from crosspool.server.state import ServerState

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
) -> AsyncGenerator[TextDelta, None]:
    """The deltas of all choices, timed for /metrics. ``arrival`` is by the clock of the event loop.

    They are taken from the engine as they come, however slowly the client reads.

    Raises OverloadedError when a time limit is passed, CrossPoolError when the engine fails on a request, and
    what AsyncLLM.stream raises.
    """
    arrivals: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue()

    async def take() -> None:
        try:
            async with aclosing(_timed(state, submissions, arrival)) as deltas:
                async for delta in deltas:
                    arrivals.put_nowait(delta)
            arrivals.put_nowait(None)
        except Exception as error:
            arrivals.put_nowait(error)

    taking = asyncio.create_task(take())
    try:
        while (item := await arrivals.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)


async def _timed(
    state: ServerState, submissions: Sequence[Submission], arrival: float
) -> AsyncGenerator[TextDelta, None]:
    clock = asyncio.get_running_loop().time
    timers = [
        SequenceTimer(state.metrics.latencies, submission.model.name, arrival)
        for submission in submissions
        for _ in submission.requests
    ]
    deltas = _limited(state.llm.stream(*submissions), len(timers), state.config.limits, arrival)
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                logger.error("the engine failed on a request: %s", delta.error)
                raise CrossPoolError("the engine failed on this request")
            now = clock()
            if delta.token_ids:
                timers[delta.index].delivered(now)
            if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                timers[delta.index].ended(now)
            yield delta


async def _limited(
    deltas: AsyncGenerator[TextDelta, None], choices: int, limits: LimitsConfig, arrival: float
) -> AsyncGenerator[TextDelta, None]:
    """The same deltas, or OverloadedError if they do not come in time.

    Until every choice has begun, the next delta may be the first token of one that still waits.
    """
    clock = asyncio.get_running_loop().time
    end = arrival + limits.total_timeout
    begun: set[int] = set()
    async with aclosing(deltas):
        while True:
            if len(begun) < choices:
                patience, what = limits.first_token_timeout, "first token"
            else:
                patience, what = limits.token_timeout, "next token"
            try:
                async with asyncio.timeout_at(min(end, clock() + patience)) as limit:
                    delta = await anext(deltas)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not limit.expired():
                    raise
                if clock() >= end:
                    raise OverloadedError(
                        f"the request took longer than {limits.total_timeout:g} s"
                    ) from None
                raise OverloadedError(f"the {what} did not come within {patience:g} s") from None
            begun.add(delta.index)
            yield delta


@dataclass(slots=True)
class Choice:
    """A whole choice, put together from its deltas. ``logprobs`` is None if they were not asked for."""

    text: list[str] = field(default_factory=list)
    logprobs: list[OutputLogprobs] | None = None
    output_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def take(self, delta: TextDelta) -> None:
        self.text.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        self.output_tokens = delta.output_tokens
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


async def collect(deltas: AsyncGenerator[TextDelta, None], choices: int) -> list[Choice]:
    """All choices, whole."""
    collected = [Choice() for _ in range(choices)]
    async with aclosing(deltas):
        async for delta in deltas:
            collected[delta.index].take(delta)
    return collected


async def begin(request: Request, deltas: AsyncGenerator[TextDelta, None]) -> TextDelta:
    """The first delta. It is waited for, so that an error before it can still become an HTTP status."""

    async def first() -> TextDelta:
        return await anext(deltas)

    return await unless_disconnected(request, first())


async def chain(first: TextDelta, rest: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
    """The deltas again, with the first that ``begin`` took."""
    yield first
    async for delta in rest:
        yield delta


def usage(submissions: Sequence[Submission], output_tokens: int) -> Usage:
    """Prompts count once, however many choices were made from them."""
    prompt_tokens = sum(len(submission.prompt_token_ids) for submission in submissions)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=output_tokens,
        total_tokens=prompt_tokens + output_tokens,
    )
