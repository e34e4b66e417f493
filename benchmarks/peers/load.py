"""Streams of tokens over HTTP, with the time of every event: closed loops of seeded random prompts.

A server may hold back text that is not yet whole characters, so one event can carry several tokens; the count
of tokens is the server's own (``usage``), and all requests are made so that it is known beforehand.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from peers.places import PeerError

FIRST_TOKEN, LAST_TOKEN = 100, 20_000
"""Prompts are drawn from these token ids: ordinary words, no special tokens."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str
    model: str


@dataclass(frozen=True, slots=True)
class Stream:
    """One request: when it was sent, when each event with text came, and its tokens.

    Times are seconds of ``time.perf_counter``.
    """

    sent: float
    events: tuple[float, ...]
    tokens: int

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.events[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [later - earlier for earlier, later in zip(self.events, self.events[1:], strict=False)]

    @property
    def tokens_per_event(self) -> float:
        return self.tokens / len(self.events)


def make_prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(tokens)]


def new_client() -> httpx.AsyncClient:
    """A client that waits as long as it takes."""
    return httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))


async def complete(
    client: httpx.AsyncClient, endpoint: Endpoint, prompt: Sequence[int], max_tokens: int
) -> Stream:
    """Send one request and read its stream to the end. Raises PeerError for any answer but so many tokens."""
    events: list[float] = []
    sent = time.perf_counter()
    tokens = await follow(client, endpoint, prompt, max_tokens, events)
    if tokens != max_tokens or not events:
        raise PeerError(f"{endpoint.model} made {tokens} tokens in {len(events)} events, not {max_tokens}")
    return Stream(sent, tuple(events), tokens)


async def follow(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    prompt: Sequence[int],
    max_tokens: int,
    events: list[float],
) -> int | None:
    """Append the time of each event with text to ``events``; return the tokens that the server counted.

    Whoever cancels it finds in ``events`` what came until then. Raises PeerError for an error of the server.
    """
    body = {
        "model": endpoint.model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = None
    async with client.stream("POST", f"{endpoint.url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            reason = (await response.aread()).decode(errors="replace")
            raise PeerError(f"{endpoint.model} answered {response.status_code}: {reason[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if "error" in event:
                raise PeerError(f"{endpoint.model}: {event['error']}")
            if event["choices"] and event["choices"][0].get("text"):
                events.append(now)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return tokens


def closed_loop(
    endpoint: Endpoint, *, streams: int, prompt_tokens: int, output_tokens: int, seed: int
) -> list[Stream]:
    """So many requests at once, each of its own prompt. Equal seeds make equal prompts."""
    rng = random.Random(seed)
    prompts = [make_prompt(rng, prompt_tokens) for _ in range(streams)]

    async def run() -> list[Stream]:
        async with new_client() as client:
            return await asyncio.gather(
                *(complete(client, endpoint, prompt, output_tokens) for prompt in prompts)
            )

    return asyncio.run(run())


def decode_rate(streams: Sequence[Stream]) -> float:
    """Tokens per second of all streams together, while all of them decode.

    Raises PeerError if there was no such time.
    """
    begin = max(stream.events[0] for stream in streams)
    end = min(stream.events[-1] for stream in streams)
    if end <= begin:
        raise PeerError("the streams never decoded at the same time: they need more tokens")
    tokens = sum(
        stream.tokens_per_event * sum(begin < event <= end for event in stream.events) for stream in streams
    )
    return tokens / (end - begin)
