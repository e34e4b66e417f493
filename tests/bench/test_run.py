from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from itertools import islice

import pytest

from crosspool.bench.arrivals import poisson
from crosspool.bench.client import Record
from crosspool.bench.prompts import Span
from crosspool.bench.run import Measurement, measure
from crosspool.bench.server_use import ServerWatch
from crosspool.bench.statistics import figures
from crosspool.core.errors import ConfigError, CrossPoolError
from helpers_load import small_load
from helpers_stream_server import Behaviour, StreamServer, stream_server

pytestmark = pytest.mark.integration


def asked(server: StreamServer, model: str) -> list[tuple[list[int], int]]:
    """Prompt and length of each request, but for the first one, which only tries."""
    return [(body["prompt"], body["max_tokens"]) for body in server.models[model].bodies[1:]]


def test_each_model_gets_the_load() -> None:
    with stream_server(a=Behaviour(), b=Behaviour(tokens_per_event=2)) as server:
        result = measure(server.url, small_load("a", "b"))
    one, two = (figures(result.of(model), result.seconds) for model in ("a", "b"))
    assert (one.requests, one.finished, one.failed, one.unfinished) == (3, 3, 0, 0)
    assert (one.prompt_tokens, one.output_tokens, one.wanted_tokens, one.events) == (24, 18, 18, 18)
    assert (two.output_tokens, two.events, two.tokens_per_event) == (18, 9, 2.0)
    assert len(result.records) == 6 and not result.interrupted
    assert 0 < max(record.ended or 0 for record in result.records) - result.begin == result.seconds


def test_all_that_the_server_lists() -> None:
    with stream_server(a=Behaviour(), b=Behaviour()) as server:
        result = measure(server.url, small_load())
    assert [*result.dialects] == ["a", "b"]


def test_lengths_and_token_ids_are_drawn_from_their_spans() -> None:
    load = small_load("a", requests=30, prompt_tokens=Span(3, 6), output_tokens=Span(2, 4))
    with stream_server(a=Behaviour()) as server:
        measure(server.url, load)
    assert {len(prompt) for prompt, _ in asked(server, "a")} == {3, 4, 5, 6}
    assert {tokens for _, tokens in asked(server, "a")} == {2, 3, 4}
    assert all(100 <= token <= 20_000 for prompt, _ in asked(server, "a") for token in prompt)


def test_equal_seeds_ask_the_same_in_every_kind_of_load() -> None:
    def prompts(seed: int, **fields: object) -> list[tuple[list[int], int]]:
        with stream_server(a=Behaviour(), b=Behaviour()) as server:
            measure(server.url, small_load("b", "a", seed=seed, requests=4, **fields))
            return sorted(asked(server, "a"))

    first = prompts(1, concurrency=1)
    assert first == prompts(1, rate=200.0, concurrency=None)
    assert first != prompts(2, concurrency=1)


def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    with stream_server(a=Behaviour(first=0.02)) as server:
        result = measure(server.url, small_load("a", requests=20, rate=100.0))
    times = list(islice(poisson(random.Random("0 arrivals a"), 100.0), 20))
    assert [record.due - result.begin for record in result.records] == pytest.approx(times)
    assert all(record.sent >= record.due > result.begin for record in result.records)
    one = figures(result.records, result.seconds)
    assert one.ttft_ms is not None and one.late_ms is not None
    assert one.ttft_ms.p50 >= 20
    late = [1000 * (record.sent - record.due) for record in result.records]
    assert one.late_ms.max == pytest.approx(max(late))


@pytest.mark.parametrize("fields", [{"rate": 100.0}, {"concurrency": 2}])
def test_a_duration_ends_the_sending_and_what_runs_is_waited_for(fields: dict[str, float]) -> None:
    with stream_server(a=Behaviour()) as server:
        result = measure(server.url, small_load("a", duration=0.3, **fields))
    assert result.records and all(record.finished for record in result.records)
    assert len(result.records) > 2
    if "rate" in fields:
        assert max(record.due for record in result.records) - result.begin < 0.3


def test_some_fail_and_the_others_count() -> None:
    with stream_server(
        a=Behaviour(fail_every=3), b=Behaviour(hang_up_after=2), c=Behaviour(short_by=1)
    ) as server:
        result = measure(server.url, small_load("a", "b", "c", requests=6, concurrency=1))
    one, two, three = (figures(result.of(model), result.seconds) for model in ("a", "b", "c"))
    assert (one.finished, one.failed, one.failed_share) == (4, 2, 2 / 6)
    assert one.errors["HTTP 500"].count == 2 and one.errors["HTTP 500"].example == "lost it"
    assert (two.finished, two.failed, two.output_tokens, two.wanted_tokens) == (0, 6, 12, 0)
    assert two.errors.keys() == {"cut off"} and two.e2e_ms is None
    assert two.tbt_ms is not None and two.tbt_ms.count == 6
    assert (three.finished_tokens, three.wanted_tokens) == (30, 36)


def test_ctrl_c_ends_it_with_what_came() -> None:
    def press(records: Sequence[Record]) -> None:
        if [len(record.events) for record in records] == [2, 2]:
            os.kill(os.getpid(), signal.SIGINT)

    with stream_server(a=Behaviour(slow_gap=60)) as server:
        result = measure(server.url, small_load("a", requests=5), observe=press)
    one = figures(result.records, result.seconds)
    assert result.interrupted
    assert (one.requests, one.finished, one.failed, one.unfinished) == (2, 0, 0, 2)
    assert one.events == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_server_is_watched_meanwhile() -> None:
    watch = ServerWatch(os.getpid())
    with stream_server(a=Behaviour()) as server:
        result = measure(server.url, small_load("a"), watch=watch)
    use = watch.use()
    assert use.cpu_seconds is not None and use.cpu_seconds >= 0
    assert use.rss.begin and use.rss.peak and use.rss.end
    assert use.rss.peak >= max(use.rss.begin, use.rss.end)
    assert isinstance(result, Measurement)


def test_no_server_and_no_such_model() -> None:
    with stream_server(a=Behaviour()) as server, pytest.raises(CrossPoolError, match="HTTP 404: no model b"):
        measure(server.url, small_load("b"))
    with pytest.raises(CrossPoolError, match="no connection"):
        measure(server.url, small_load("a"))
    with pytest.raises(CrossPoolError, match="does not list its models"):
        measure(server.url, small_load())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"requests": 1, "duration": 1.0}, "either requests or duration"),
        ({"requests": None}, "either requests or duration"),
        ({"rate": 1.0, "concurrency": 1}, "either rate or concurrency"),
        ({"requests": 0}, "requests must be a positive number"),
        ({"rate": float("nan")}, "rate must be a positive number"),
        ({"timeout": float("inf")}, "timeout must be a positive number"),
        ({"concurrency": -1}, "concurrency must be a positive number"),
        ({"models": ("a", "a")}, "a model is given twice"),
    ],
)
def test_loads_that_cannot_be(fields: dict[str, object], said: str) -> None:
    models = fields.pop("models", ("a",))
    with pytest.raises(ConfigError, match=said):
        small_load(*models, **fields)  # type: ignore[misc]
