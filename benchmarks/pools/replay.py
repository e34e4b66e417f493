"""A window of a trace through an engine: arrivals as fast as a rate says, and what became of each request."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from crosspool.core.errors import RequestTooLargeError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.engine.engine import Engine

Window = Mapping[str, "np.ndarray[Any, Any]"]
"""Columns of a trace (benchmarks/data)."""


@dataclass
class Served:
    """One request: its arrival in seconds of the replay, and the times of its tokens."""

    arrival: float
    burst: bool
    prompt: int
    wanted: int
    refused: bool = False
    tokens: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What a mode made of one window."""

    served: list[Served]
    held: list[tuple[float, float]]
    preemptions: int

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between tokens while the burst goes on: from its first arrival to its last token, or
        its last arrival if all of it was refused. Without a burst, all of them."""
        burst = [s for s in self.served if s.burst] or self.served
        begin, end = min(s.arrival for s in burst), max([s.arrival, *s.tokens][-1] for s in burst)
        return [
            1e3 * (b - a)
            for s in self.served
            for a, b in zip(s.tokens, s.tokens[1:], strict=False)
            if b > begin and a < end
        ]

    @property
    def waits(self) -> list[float]:
        """Seconds to the first token."""
        return [s.tokens[0] - s.arrival for s in self.served if s.tokens]


def requests_of(
    engine: Engine, window: Window, rate: float, numbers: Iterator[int], shrink: tuple[int, int]
) -> list[tuple[Request, Served]]:
    """In the order of arrival. Prompts and outputs are so many times shorter than in the trace."""
    rng = random.Random(1)
    made = []
    for at, model, prompt, output, burst in zip(
        window["t_seconds"] / rate,
        window["model_index"],
        np.maximum(4, window["prompt_tokens"] // shrink[0]),
        np.maximum(2, window["output_tokens"] // shrink[1]),
        window["burst"],
        strict=True,
    ):
        length, vocabulary = int(output), engine.info.models[model].vocab_size
        tokens = tuple(rng.randrange(1, vocabulary) for _ in range(int(prompt)))
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        number, index = RequestId(next(numbers)), ModelIndex(int(model))
        request = Request(number, index, tokens, params, length, 0, frozenset(), Nanoseconds(0))
        made.append((request, Served(float(at), bool(burst), len(tokens), length)))
    return made


def replay(
    engine: Engine,
    window: Window,
    rate: float,
    numbers: Iterator[int],
    shrink: tuple[int, int],
    seconds: float = inf,
) -> Outcome:
    """Until everything is served. What is not after so many ``seconds`` is given up."""
    made = requests_of(engine, window, rate, numbers, shrink)
    requests = {request.id: served for request, served in made}
    held: list[tuple[float, float]] = []
    due = [request for request, _ in reversed(made)]
    before = sum(model.preemptions for model in engine.stats().models)
    begin, total = time.perf_counter(), engine.stats().kv_pages_total
    sampled = 0.0
    while due or engine.has_work():
        now = time.perf_counter() - begin
        if now > seconds:
            due.clear()
            for number in requests:
                engine.abort(number)
        while due and requests[due[-1].id].arrival <= now:
            request = due.pop()
            try:
                engine.add(request)
            except RequestTooLargeError:
                requests[request.id].refused = True
        for output in engine.step():
            at = time.perf_counter() - begin
            requests[output.request].tokens += [at] * len(output.token_ids)
        if now > sampled + 0.05:
            stats = engine.stats()
            held.append((now, 1 - (stats.kv_pages_free + stats.kv_pages_cached) / total))
            sampled = now
        wait = 0.05 if not due else min(0.05, max(0.0, requests[due[-1].id].arrival - now))
        engine.wait(wait)
    after = sum(model.preemptions for model in engine.stats().models)
    return Outcome(list(requests.values()), held, after - before)


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    gaps = np.concatenate([outcome.gaps for outcome in outcomes])
    waits = np.concatenate([outcome.waits for outcome in outcomes])
    served = [s for outcome in outcomes for s in outcome.served]
    return {
        "p50": float(np.percentile(gaps, 50)),
        "p99": float(np.percentile(gaps, 99)),
        "max": float(gaps.max()),
        "ttft_p50": float(np.percentile(waits, 50)),
        "ttft_p99": float(np.percentile(waits, 99)),
        "refused": sum(s.refused for s in served),
        "requests": len(served),
        "preemptions": sum(outcome.preemptions for outcome in outcomes),
        "held": float(np.mean([share for outcome in outcomes for _, share in outcome.held])),
    }


def live_share(outcomes: list[Outcome], pool_tokens: float) -> float:
    """The mean, over samples, of the tokens of requests between their first and their last, over the tokens
    for which the devices have memory beside the weights."""
    shares = [
        sum(
            s.prompt + int(np.searchsorted(s.tokens, at))
            for s in outcome.served
            if s.tokens and s.tokens[0] <= at < s.tokens[-1]
        )
        / pool_tokens
        for outcome in outcomes
        for at, _ in outcome.held
    ]
    return float(np.mean(shares))
