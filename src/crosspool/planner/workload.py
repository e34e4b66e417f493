"""A trace drawn from what is expected of each model, for a zoo that has no past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.core.errors import ConfigError
from crosspool.planner.trace import HOUR, Floats, Ints, Trace, make_trace

P99 = 2.3263478740408408
"""The 99% quantile of the standard normal distribution."""
WITHIN_BURST = 10.0
"""Mean seconds between the requests of a burst."""
MOST_REQUESTS = 5_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens, log-normal: half are at most ``median``, 99% at most ``p99``."""

    median: float
    p99: float

    def __post_init__(self) -> None:
        if not 1 <= self.median <= self.p99:
            raise ConfigError(f"1 <= median <= p99 is needed, not median {self.median:g}, p99 {self.p99:g}")

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        deviation = np.log(self.p99 / self.median) / P99
        tokens = self.median * np.exp(deviation * rng.standard_normal(count))
        return np.asarray(np.maximum(1, np.rint(tokens)), np.int64)


@dataclass(frozen=True, slots=True)
class Expected:
    """One model's requests: ``rate`` a second on average, ``burst`` of them together on average (1: each
    comes independently of all others)."""

    rate: float
    prompt: Lengths
    output: Lengths
    burst: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < np.inf:
            raise ConfigError(f"a rate must be at least 0 requests a second, not {self.rate:g}")
        if not 1 <= self.burst < np.inf:
            raise ConfigError(f"a burst has at least 1 request, not {self.burst:g}")


def draw_trace(expected: Sequence[Expected], hours: float, seed: int) -> Trace:
    """A trace of so many hours: bursts come as a Poisson process and have geometric sizes."""
    total = sum(model.rate for model in expected) * hours * HOUR
    if total > MOST_REQUESTS:
        raise ConfigError(f"{total:,.0f} requests in {hours:g} hours; at most {MOST_REQUESTS:,} are drawn")
    rng = np.random.default_rng(seed)
    starts = [_draw_starts(rng, model, hours * HOUR) for model in expected]
    return make_trace(
        np.concatenate(starts),
        np.repeat(np.arange(len(expected)), [len(some) for some in starts]),
        np.concatenate([m.prompt.draw(rng, len(s)) for m, s in zip(expected, starts, strict=True)]),
        np.concatenate([m.output.draw(rng, len(s)) for m, s in zip(expected, starts, strict=True)]),
        models=len(expected),
        seconds=hours * HOUR,
    )


def _draw_starts(rng: np.random.Generator, model: Expected, seconds: float) -> Floats:
    bursts = rng.uniform(0, seconds, rng.poisson(model.rate / model.burst * seconds))
    sizes = rng.geometric(1 / model.burst, len(bursts))
    after = rng.exponential(WITHIN_BURST, int(sizes.sum()))
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    since = np.cumsum(after) - np.cumsum(after)[first]
    starts = np.repeat(bursts, sizes) + since
    return np.asarray(starts[starts < seconds], np.float64)
