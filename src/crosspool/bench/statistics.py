"""From records to figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.bench.client import Record


@dataclass(frozen=True, slots=True)
class Summary:
    """Of ``count`` values. Percentiles between two values are interpolated linearly."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How often an error came, and what the first of them said."""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests of one model, or of all. Times are in milliseconds; None: there are no values.

    TTFT runs from when a request was due to its first event with text, TBT between such events, E2E from when
    it was due to the stream's end. TTFT, TBT and tokens count what came of every request, E2E those that
    finished. ``unfinished`` were cut off by Ctrl-C. ``without_usage``: finished requests whose tokens the
    server did not count; their events are counted instead. ``wanted_tokens``: what the finished requests
    asked for, and ``finished_tokens`` what they got. ``late_ms``: how late requests were sent.
    """

    requests: int
    finished: int
    failed: int
    unfinished: int
    failed_share: float
    errors: dict[str, ErrorKind]
    prompt_tokens: int
    output_tokens: int
    finished_tokens: int
    wanted_tokens: int
    without_usage: int
    events: int
    tokens_per_event: float | None
    ttft_ms: Summary | None
    tbt_ms: Summary | None
    e2e_ms: Summary | None
    late_ms: Summary | None
    largest_gap_over_median: float | None
    output_tokens_per_second: float
    requests_per_second: float


def summarise(values: Sequence[float]) -> Summary | None:
    """None for no values."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
    return Summary(len(values), float(array.mean()), p50, p90, p99, float(array.max()))


def figures(records: Sequence[Record], seconds: float) -> Figures:
    """``seconds``: how long the load took; what the rates are of."""
    finished = [record for record in records if record.finished]
    failed = sum(record.failure is not None for record in records)
    tbt = summarise([1000 * gap for record in records for gap in record.gaps])
    tokens, events = sum(record.tokens for record in records), sum(len(record.events) for record in records)
    return Figures(
        requests=len(records),
        finished=len(finished),
        failed=failed,
        unfinished=len(records) - len(finished) - failed,
        failed_share=failed / len(records) if records else 0.0,
        errors=_errors(records),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in records),
        output_tokens=tokens,
        finished_tokens=sum(record.tokens for record in finished),
        wanted_tokens=sum(record.wanted_tokens for record in finished),
        without_usage=sum(record.output_tokens is None for record in finished),
        events=events,
        tokens_per_event=tokens / events if events else None,
        ttft_ms=summarise([1000 * (record.events[0] - record.due) for record in records if record.events]),
        tbt_ms=tbt,
        e2e_ms=summarise([1000 * (record.ended - record.due) for record in finished if record.ended]),
        late_ms=summarise([1000 * (record.sent - record.due) for record in records]),
        largest_gap_over_median=None if tbt is None or not tbt.p50 else tbt.max / tbt.p50,
        output_tokens_per_second=tokens / seconds if seconds else 0.0,
        requests_per_second=len(finished) / seconds if seconds else 0.0,
    )


def _errors(records: Sequence[Record]) -> dict[str, ErrorKind]:
    kinds: dict[str, ErrorKind] = {}
    for failure in (record.failure for record in records):
        if failure is not None:
            known = kinds.get(failure.kind, ErrorKind(0, failure.message))
            kinds[failure.kind] = ErrorKind(known.count + 1, known.example)
    return kinds
