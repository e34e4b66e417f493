"""Gives a load to a server and keeps what came back."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice, repeat, takewhile

from crosspool.bench.arrivals import closed_loop, open_loop, poisson
from crosspool.bench.client import Client, Record, Request, new_client, send
from crosspool.bench.dialect import Dialect, find_dialect, list_models
from crosspool.bench.prompts import TOKEN_IDS, Span
from crosspool.bench.server_use import ServerWatch
from crosspool.core.errors import ConfigError

OBSERVE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """What each model gets: ``requests`` in number or for ``duration`` seconds, either at ``rate`` a second
    (open loop) or ``concurrency`` at all times (closed loop).

    ``models`` empty: all that the server lists. ``timeout``: seconds that one request may take.
    Raises ConfigError unless exactly one of each pair is given, and is positive.
    """

    models: tuple[str, ...]
    requests: int | None
    duration: float | None
    rate: float | None
    concurrency: int | None
    prompt_tokens: Span
    output_tokens: Span
    token_ids: Span = TOKEN_IDS
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for one, other in (("requests", "duration"), ("rate", "concurrency")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ConfigError(f"give either {one} or {other}")
        for name in ("requests", "duration", "rate", "concurrency", "timeout"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} must be a positive number, not {value}")
        if len(set(self.models)) < len(self.models):
            raise ConfigError("a model is given twice")

    @property
    def is_open(self) -> bool:
        return self.rate is not None


@dataclass(slots=True)
class Measurement:
    """What came back. ``begin`` and ``end`` are seconds of ``time.perf_counter``: of the load's start, and of
    when the last request ended or Ctrl-C ended the load, which is what ``interrupted`` says."""

    url: str
    load: Load
    dialects: Mapping[str, Dialect]
    begin: float
    end: float = 0.0
    records: list[Record] = field(default_factory=list)
    interrupted: bool = False
    client_cpu_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def of(self, model: str) -> list[Record]:
        return [record for record in self.records if record.model == model]


def measure(
    url: str,
    load: Load,
    *,
    api_key: str | None = None,
    watch: ServerWatch | None = None,
    observe: Callable[[Sequence[Record]], None] = lambda _: None,
) -> Measurement:
    """Find out how the server is asked, then give it the load; call it on the main thread.

    Ctrl-C ends the load early. ``observe`` sees the records of all requests sent so far once a second.
    Raises CrossPoolError if the server does not answer a first request to each model.
    """
    return asyncio.run(_measure(url, load, api_key, watch, observe))


async def _measure(
    url: str,
    load: Load,
    api_key: str | None,
    watch: ServerWatch | None,
    observe: Callable[[Sequence[Record]], None],
) -> Measurement:
    client = new_client(url, api_key)
    models = load.models or await list_models(client, load.timeout)
    dialects = {model: await find_dialect(client, model, load.token_ids, load.timeout) for model in models}
    with watch or nullcontext():
        cpu, result = time.process_time(), Measurement(url, load, dialects, time.perf_counter())
        observer = asyncio.create_task(_observe(result.records, observe))
        result.interrupted = await _until_interrupted(asyncio.create_task(_give(client, result)))
        observer.cancel()
        result.client_cpu_seconds = time.process_time() - cpu
        now = time.perf_counter()
    ends = [now if record.ended is None else record.ended for record in result.records]
    result.end = now if result.interrupted else max(ends, default=now)
    return result


async def _until_interrupted(load: asyncio.Task[None]) -> bool:
    """Wait for the load's end; True if Ctrl-C came before it."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, load.cancel)
    try:
        await load
    except asyncio.CancelledError:
        if not load.cancelled():
            raise
        return True
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return False


async def _observe(records: Sequence[Record], observe: Callable[[Sequence[Record]], None]) -> None:
    while True:
        await asyncio.sleep(OBSERVE_SECONDS)
        observe(records)


async def _give(client: Client, result: Measurement) -> None:
    async with asyncio.TaskGroup() as running:
        for model in result.dialects:
            running.create_task(_give_model(client, result, model))


async def _give_model(client: Client, result: Measurement, model: str) -> None:
    load = result.load

    async def record_one(request: Request, due: float | None) -> None:
        now = time.perf_counter()
        record = Record(model, request.output_tokens, due or now, now)
        result.records.append(record)
        await send(client, request, due=due, timeout=load.timeout, record=record)

    requests = draw_requests(load, model, result.dialects[model])
    if load.rate is not None:
        times = poisson(random.Random(f"{load.seed} arrivals {model}"), load.rate)
        if load.duration is not None:
            times = takewhile(lambda arrival: arrival < (load.duration or 0), times)
        await open_loop(times, requests, result.begin, record_one)
    else:
        until = None if load.duration is None else result.begin + load.duration
        await closed_loop(load.concurrency or 0, requests, until, record_one)


def draw_requests(load: Load, model: str, dialect: Dialect) -> Iterator[Request]:
    """The model's requests: equal seeds draw equal ones, whatever the other models and the arrivals are."""
    rng = random.Random(f"{load.seed} prompts {model}")
    for _ in islice(repeat(None), load.requests):
        prompt, output = load.prompt_tokens.draw(rng), load.output_tokens.draw(rng)
        yield dialect.request(rng, model, prompt, output, load.token_ids)
