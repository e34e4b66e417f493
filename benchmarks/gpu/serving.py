"""Requests through an engine, and when their tokens come."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import time
from dataclasses import dataclass, field

from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.core.token_record import RECORD_WORDS
from crosspool.engine.engine import Engine

RECORD_BYTES = 8 * RECORD_WORDS
PIPE_BYTES = 1 << 20
MOST_SECONDS = 60.0

_ids = itertools.count(1)


def random_request(engine: Engine, rng: random.Random, prompt: int, output: int, model: int = 0) -> Request:
    """Greedy, of just so many tokens."""
    vocabulary = engine.info.models[model].vocab_size
    tokens = tuple(rng.randrange(1, vocabulary) for _ in range(prompt))
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    nothing: frozenset[int] = frozenset()
    return Request(
        RequestId(next(_ids)), ModelIndex(model), tokens, params, output, 0, nothing, Nanoseconds(0)
    )


def serve(engine: Engine, requests: list[Request]) -> dict[int, list[float]]:
    """All at once. Returns the times of each one's tokens in seconds, before them when it was added."""
    times: dict[int, list[float]] = {}
    for request in requests:
        times[request.id] = [time.perf_counter()]
        engine.add(request)
    end = time.perf_counter() + MOST_SECONDS
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(f"request {output.request} failed: {output.error}")
            times[output.request] += [time.perf_counter()] * len(output.token_ids)
        if time.perf_counter() > end:
            raise TimeoutError(f"{len(requests)} requests are not served after {MOST_SECONDS:.0f} s")
        engine.wait(1.0)
    return times


def gaps_while_all_decode(times: dict[int, list[float]]) -> list[float]:
    """Seconds between tokens of each request, from when all have one until the first ends."""
    begin, end = max(own[1] for own in times.values()), min(own[-1] for own in times.values())
    return [
        after - before
        for own in times.values()
        for before, after in itertools.pairwise(own[1:])
        if begin <= before and after <= end
    ]


@dataclass
class HostTime:
    """Processor seconds for so many tokens: of the engine's thread, and of the whole process."""

    tokens: int = 0
    engine: float = 0.0
    process: float = 0.0
    wall: float = 0.0


@dataclass
class _Pipe:
    """Nobody reads it but between measurements; it is large enough."""

    reader: int = field(init=False)
    writer: int = field(init=False)

    def __post_init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def read(self) -> int:
        """How many tokens have come since the last call."""
        total = 0
        while True:
            try:
                total += len(os.read(self.reader, 1 << 16))
            except BlockingIOError:
                return total // RECORD_BYTES

    def refuse(self) -> None:
        """From now on nothing can be written: whoever tries keeps it. The writer's number stays taken."""
        os.close(self.reader)


def host_time(engine: Engine, requests: list[Request]) -> HostTime:
    """While all decode and their tokens go into a pipe, as they do in a server: from the moment at which each
    has a token, until the first request ends. Afterwards tokens come through the engine again."""
    pipe = _Pipe()
    engine.stream_to(pipe.writer)
    for request in requests:
        engine.add(request)
    seen, end = 0, time.perf_counter() + MOST_SECONDS
    while seen < len(requests) and time.perf_counter() < end:
        seen += pipe.read() + sum(len(output.token_ids) for output in engine.step())
        engine.wait(0.001)
    used = HostTime(-seen, -time.thread_time(), -time.process_time(), -time.perf_counter())
    ended = False
    while not ended and time.perf_counter() < end:
        outputs = engine.step()
        used.tokens += sum(len(output.token_ids) for output in outputs)
        ended = any(output.finish_reason is not None for output in outputs)
        engine.wait(1.0)
    used.engine += time.thread_time()
    used.process += time.process_time()
    used.wall += time.perf_counter()
    used.tokens += seen + pipe.read()
    while engine.has_work() and time.perf_counter() < end:
        engine.step()
        engine.wait(0.1)
    pipe.refuse()
    return used
