"""Streams of tokens over HTTP, with the time of every event: closed loops of seeded random prompts.

A server may hold back text that is not yet whole characters, so one event can carry several tokens; the count
of tokens is the server's own (``usage``), and all requests are made so that it is known beforehand.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from crosspool.bench.client import Client, Record, new_client, send
from crosspool.bench.dialect import completion
from crosspool.bench.prompts import TOKEN_IDS, random_token_ids
from peers.places import PeerError

__all__ = [
    "Endpoint",
    "Stream",
    "closed_loop",
    "complete",
    "decode_rate",
    "follow",
    "make_prompt",
    "new_client",
]


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
    return random_token_ids(rng, tokens, TOKEN_IDS)


async def complete(client: Client, endpoint: Endpoint, prompt: Sequence[int], max_tokens: int) -> Stream:
    """Send one request and read its stream to the end. Raises PeerError for any answer but so many tokens."""
    record = _record(endpoint, max_tokens, [])
    await _send(client, endpoint, prompt, record)
    if record.output_tokens != max_tokens or not record.events:
        raise PeerError(
            f"{endpoint.model} made {record.output_tokens} tokens in {len(record.events)} events, "
            f"not {max_tokens}"
        )
    return Stream(record.sent, tuple(record.events), max_tokens)


async def follow(
    client: Client,
    endpoint: Endpoint,
    prompt: Sequence[int],
    max_tokens: int,
    events: list[float],
) -> int | None:
    """Append the time of each event with text to ``events``; return the tokens that the server counted.

    Whoever cancels it finds in ``events`` what came until then. Raises PeerError for an error of the server.
    """
    record = _record(endpoint, max_tokens, events)
    await _send(client, endpoint, prompt, record)
    return record.output_tokens


def _record(endpoint: Endpoint, max_tokens: int, events: list[float]) -> Record:
    now = time.perf_counter()
    return Record(endpoint.model, max_tokens, now, now, events)


async def _send(client: Client, endpoint: Endpoint, prompt: Sequence[int], record: Record) -> None:
    request = completion(endpoint.model, prompt, record.wanted_tokens, server=endpoint.url)
    await send(client, request, record=record)
    if record.failure is not None:
        raise PeerError(f"{endpoint.model}: {record.failure.kind}: {record.failure.message}")


def closed_loop(
    endpoint: Endpoint, *, streams: int, prompt_tokens: int, output_tokens: int, seed: int
) -> list[Stream]:
    """So many requests at once, each of its own prompt. Equal seeds make equal prompts."""
    rng = random.Random(seed)
    prompts = [make_prompt(rng, prompt_tokens) for _ in range(streams)]

    async def run() -> list[Stream]:
        client = new_client()
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
