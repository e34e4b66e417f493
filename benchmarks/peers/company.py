"""Users of several models at once: readers whose streams go on while prompts come, and what they see."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from crosspool.bench.client import Client
from peers.load import Endpoint, Stream, closed_loop, complete, follow, make_prompt
from peers.plan import Sizes
from peers.servers import Deployment

ANSWER_TOKENS = 8
"""Of a request that is about its prompt: enough for some text, which one token need not be."""


@dataclass(slots=True)
class Reader:
    """Somebody who always reads: requests one after another to one model, each with a prompt of its own.

    ``sent`` has the time of each request, ``requests`` those of its events so far, in seconds of
    ``time.perf_counter``.
    """

    endpoint: Endpoint
    prompt_tokens: int
    output_tokens: int
    seed: int
    requests: list[list[float]] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    async def run(self, client: Client) -> None:
        """Ask until cancelled."""
        rng = random.Random(self.seed)
        while True:
            events: list[float] = []
            prompt = make_prompt(rng, self.prompt_tokens)
            self.requests.append(events)
            self.sent.append(time.perf_counter())
            await follow(client, self.endpoint, prompt, self.output_tokens, events)

    @property
    def has_begun(self) -> bool:
        return bool(self.requests and self.requests[0])

    def gaps(self, begin: float, end: float) -> list[float]:
        """Milliseconds between events of one request, of all gaps that lie at least in part in this time.

        A gap that was still open at ``end`` counts as long as it then was, so that a stream which stood still
        is seen. Between requests there is no gap: that is the next one's time to the first token.
        """
        pairs = [(a, b) for events in self.requests for a, b in itertools.pairwise(events)]
        if self.requests and self.requests[-1] and self.requests[-1][-1] < end:
            pairs.append((self.requests[-1][-1], end))
        return [1000 * (b - a) for a, b in pairs if b > begin and a < end]

    def waits(self, begin: float, end: float) -> list[float]:
        """Seconds to the first token, or to the end of the time, of the requests that were sent in it."""
        asked = zip(self.sent, self.requests, strict=True)
        return [min([*events[:1], end]) - sent for sent, events in asked if begin < sent < end]


@dataclass(slots=True)
class LatePrompt:
    """Somebody who waits a while, then sends one prompt. ``answer`` is set once it is answered in full."""

    endpoint: Endpoint
    prompt_tokens: int
    seconds: float
    seed: int
    answer: Stream | None = None
    has_begun = True

    async def run(self, client: Client) -> None:
        await asyncio.sleep(self.seconds)
        prompt = make_prompt(random.Random(self.seed), self.prompt_tokens)
        self.answer = await complete(client, self.endpoint, prompt, ANSWER_TOKENS)


@asynccontextmanager
async def in_company(client: Client, users: Sequence[Reader | LatePrompt]) -> AsyncIterator[None]:
    """All readers have their first token; all users go on until this is left. Raises what any raised."""
    tasks = [asyncio.create_task(user.run(client)) for user in users]
    try:
        while not all(user.has_begun for user in users):
            _raise_first_error(tasks)
            await asyncio.sleep(0.01)
        yield
        _raise_first_error(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_first_error(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


def over_alone(gaps: Sequence[float], alone: Sequence[float]) -> dict[str, float]:
    """Median, P99 and longest gap, each over that of the stream alone."""
    return {
        "tbt_p50_over_alone": float(np.percentile(gaps, 50) / np.percentile(alone, 50)),
        "tbt_p99_over_alone": float(np.percentile(gaps, 99) / np.percentile(alone, 99)),
        "tbt_max_over_alone": max(gaps) / max(alone),
    }


def warm_up(deployment: Deployment, sizes: Sizes, seed: int) -> None:
    """Ask each model once, so that none has its first request in a measurement."""
    with deployment.awake():
        for endpoint in deployment.endpoints.values():
            closed_loop(
                endpoint, streams=1, prompt_tokens=sizes.prompt, output_tokens=ANSWER_TOKENS, seed=seed
            )
