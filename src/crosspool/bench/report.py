"""A measurement as JSON, and as rows and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from crosspool.bench.client import Record
from crosspool.bench.dialect import Dialect, Fields, Prompt
from crosspool.bench.run import Load, Measurement
from crosspool.bench.server_use import Bytes, ServerUse
from crosspool.bench.statistics import Figures, Summary, figures

ALL = "(all)"
LATENCY_COLUMNS = ("model", "ms", "values", "mean", "P50", "P90", "P99", "max")
COUNT_COLUMNS = (
    *("model", "requests", "failed", "prompt tokens", "output tokens", "tokens per event"),
    *("output tokens/s", "requests/s", "largest gap / median"),
)
FROM_DUE = "open loop: TTFT and E2E run from when a request was due, whether or not it was sent by then"
FROM_SENT = "closed loop: TTFT and E2E run from when a request was sent"


def by_model(measurement: Measurement) -> dict[str, Figures]:
    return {model: figures(measurement.of(model), measurement.seconds) for model in measurement.dialects}


def overall(measurement: Measurement) -> Figures:
    return figures(measurement.records, measurement.seconds)


def to_show(measurement: Measurement) -> dict[str, Figures]:
    """By model, and of all together where there are several."""
    found = by_model(measurement)
    return found if len(found) == 1 else {**found, ALL: overall(measurement)}


def as_plain(
    measurement: Measurement, server: ServerUse | None, about: Mapping[str, Any], *, requests: bool
) -> dict[str, Any]:
    """Everything, as plain data. ``about`` goes first: command line, versions, machine.

    ``requests``: with the times of every request too, in seconds after the begin of the load.
    """
    plain = {
        **about,
        "url": measurement.url,
        "load": _plain_load(measurement.load),
        "seconds": measurement.seconds,
        "interrupted": measurement.interrupted,
        "asked_with": {model: asdict(dialect) for model, dialect in measurement.dialects.items()},
        "models": {model: asdict(found) for model, found in by_model(measurement).items()},
        "all": asdict(overall(measurement)),
        "server": None if server is None else asdict(server),
        "client_cpu_seconds": measurement.client_cpu_seconds,
    }
    if requests:
        plain["requests"] = [_plain_record(record, measurement.begin) for record in measurement.records]
    return plain


def _plain_load(load: Load) -> dict[str, Any]:
    spans = {name: str(getattr(load, name)) for name in ("prompt_tokens", "output_tokens", "token_ids")}
    return {
        **asdict(load),
        "models": list(load.models),
        **spans,
        "latencies": FROM_DUE if load.is_open else FROM_SENT,
    }


def _plain_record(record: Record, begin: float) -> dict[str, Any]:
    return {
        "model": record.model,
        "due": record.due - begin,
        "sent": record.sent - begin,
        "events": [event - begin for event in record.events],
        "ended": None if record.ended is None else record.ended - begin,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "wanted_tokens": record.wanted_tokens,
        "failure": None if record.failure is None else asdict(record.failure),
    }


def latency_rows(found: Mapping[str, Figures]) -> list[tuple[str, ...]]:
    rows = []
    for model, one in found.items():
        for name, summary in (("TTFT", one.ttft_ms), ("TBT", one.tbt_ms), ("E2E", one.e2e_ms)):
            rows.append((model, name, *_cells(summary)))
    return rows


def _cells(summary: Summary | None) -> tuple[str, ...]:
    if summary is None:
        return ("0", *[""] * 5)
    values = (summary.mean, summary.p50, summary.p90, summary.p99, summary.max)
    return (f"{summary.count:,}", *(f"{value:,.2f}" for value in values))


def count_rows(found: Mapping[str, Figures]) -> list[tuple[str, ...]]:
    return [
        (
            model,
            f"{one.requests:,}",
            f"{one.failed:,} ({one.failed_share:.1%})",
            f"{one.prompt_tokens:,}",
            f"{one.output_tokens:,}",
            _optional(one.tokens_per_event),
            f"{one.output_tokens_per_second:,.1f}",
            f"{one.requests_per_second:,.2f}",
            _optional(one.largest_gap_over_median),
        )
        for model, one in found.items()
    ]


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def notes(measurement: Measurement, server: ServerUse | None) -> list[str]:
    """What a reader of the tables has to know, a sentence each."""
    said = [FROM_DUE if measurement.load.is_open else FROM_SENT]
    for model, one in by_model(measurement).items():
        said += [f"{model}: {note}" for note in _model_notes(measurement.dialects[model], one)]
    late = overall(measurement).late_ms
    if measurement.load.is_open and late is not None:
        said.append(f"requests were sent {late.p50:.2f} ms late (P50), {late.max:.2f} ms at most")
    if server is not None:
        said += _server_notes(server)
    client = measurement.client_cpu_seconds
    said.append(f"the load took {measurement.seconds:,.2f} s, and this client {client:,.2f} s of a core")
    if measurement.interrupted:
        said.append("interrupted: requests that were running are counted with what had come of them")
    return said


def _model_notes(dialect: Dialect, one: Figures) -> list[str]:
    said = [
        f"{kind}: {error.count:,} of {one.requests:,} requests, the first with: {error.example}"
        for kind, error in one.errors.items()
    ]
    if one.finished_tokens != one.wanted_tokens:
        said.append(f"{one.finished_tokens:,} tokens came of {one.wanted_tokens:,} that were asked for")
    if one.without_usage:
        said.append(f"{one.without_usage:,} answers had no usage: their tokens are counted as events")
    if one.unfinished:
        said.append(f"{one.unfinished:,} requests were cut off")
    if (dialect.prompt, dialect.fields) != (Prompt.TOKEN_IDS, Fields.EXACT):
        said.append(
            f"prompts are {dialect.prompt}, optional fields: {dialect.fields}; "
            f"to the most exact request the server said {dialect.refusal}"
        )
    return said


def _server_notes(server: ServerUse) -> list[str]:
    cpu = "" if server.cpu_seconds is None else f", {server.cpu_seconds:,.1f} s of processor time"
    return [
        f"the server, process {server.pid}: RSS {_sizes(server.rss)} MiB, PSS {_sizes(server.pss)} MiB "
        f"(begin, peak, end){cpu}"
    ]


def _sizes(sizes: Bytes) -> str:
    known = (sizes.begin, sizes.peak, sizes.end)
    return " / ".join("?" if size is None else f"{size / 2**20:,.0f}" for size in known)
