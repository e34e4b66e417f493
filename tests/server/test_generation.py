from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect, Request

from crosspool.core.sampling import SamplingParams
from crosspool.server import generation
from crosspool.server.config import LimitsConfig, ServerConfig
from helpers_polling import wait_until
from helpers_sse import read_events

pytestmark = pytest.mark.integration

LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 800}


def patient(**times: float) -> ServerConfig:
    return ServerConfig(limits=LimitsConfig(**times))


def stall(application, after: int) -> None:
    """Let the engine make no more tokens of any request than ``after``."""
    advance = application.engine._advance

    def stalled(sequence: object) -> None:
        if sequence.made < after:
            advance(sequence)

    application.engine._advance = stalled


async def all_pages_free(application) -> None:
    def free() -> bool:
        stats = application.engine.stats()
        return stats.kv_pages_held == 0

    await wait_until(free, "pages are still held", 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_token_is_not_waited_for_for_ever(start_application, stream: bool) -> None:
    application = await start_application(patient(first_token_timeout=0.2))
    stall(application, after=0)
    response = await application.post("/v1/completions", **LONG, stream=stream)
    assert response.status_code == 503
    assert "first token did not come within 0.2 s" in response.json()["error"]["message"]
    assert "Retry-After" in response.headers
    await all_pages_free(application)


async def test_the_next_token_is_not_waited_for_for_ever(start_application) -> None:
    application = await start_application(patient(token_timeout=0.2))
    stall(application, after=2)
    response = await application.post("/v1/completions", **LONG, stream=True)
    *chunks, last = read_events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab"
    assert "next token" in last["error"]["message"]
    await all_pages_free(application)


async def test_a_choice_that_still_waits_has_the_time_for_its_first_token(start_application) -> None:
    """One choice pauses after two tokens; the other, still in the queue, lets it go on later."""
    application = await start_application(patient(token_timeout=0.2))
    advance, begin = application.engine._advance, time.monotonic() + 1

    def paused(sequence: object) -> None:
        if (sequence.made < 2 and sequence.request.seed == 5) or time.monotonic() > begin:
            advance(sequence)

    application.engine._advance = paused
    response = await application.post("/v1/completions", **{**LONG, "max_tokens": 4}, n=2, seed=5)
    assert response.status_code == 200
    assert [choice["text"] for choice in response.json()["choices"]] == ["abca"] * 2


async def test_a_slow_reader_does_not_slow_the_engine_or_its_figures(application) -> None:
    """All is taken from the engine while the client reads nothing."""
    submission = await application.state.llm.prepare("abc", SamplingParams(max_tokens=50), model="tiny")
    async with aclosing(generation.run(application.state, [submission], time.monotonic())) as deltas:
        assert len(await anext(deltas)) == 1
        await all_pages_free(application)
        await wait_until(lambda: figure(application, "e2e_request_latency_seconds_count") == 1, "unread", 5)
        assert figure(application, "inter_token_latency_seconds_count") == 49
        (unread,) = [several async for several in deltas]
        assert [delta.output_tokens for delta in unread] == list(range(2, 51))


def figure(application, name: str) -> float:
    families = text_string_to_metric_families(application.state.metrics.render(None).decode())
    samples = [s for family in families for s in family.samples if s.name == f"vllm:{name}"]
    return samples[0].value if samples else 0


async def test_the_whole_request_has_a_limit(start_application) -> None:
    application = await start_application(patient(total_timeout=0.5))
    response = await application.post("/v1/completions", **LONG)
    assert response.status_code == 503
    assert "longer than 0.5 s" in response.json()["error"]["message"]
    await all_pages_free(application)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_the_preparing_of_a_prompt_has_a_limit(
    start_application, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    application = await start_application(patient(first_token_timeout=0.2))
    go_on = threading.Event()
    front = application.state.llm.front("tiny")
    for method in ("prompt_tokens", "tokenize"):
        monkeypatch.setattr(front, method, lambda *_, **__: go_on.wait(30) and (5,))
    response = await application.post(path, model="tiny", prompt="a")
    go_on.set()
    assert response.status_code == 503
    assert "could not be prepared within 0.2 s" in response.json()["error"]["message"]
    assert "Retry-After" in response.headers


async def test_an_aborted_choice_is_not_counted_as_served(application) -> None:
    task = asyncio.create_task(application.post("/v1/completions", **LONG))
    await wait_until(lambda: application.engine._sequences, "not started", 10)
    (sequence,) = application.engine._sequences.values()
    await wait_until(lambda: sequence.made > 3, "no tokens", 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await all_pages_free(application)
    metrics = (await application.client.get("/metrics")).text
    assert 'vllm:e2e_request_latency_seconds_count{model_name="tiny"}' not in metrics
    assert 'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0' in metrics


def request_of(*messages: dict) -> Request:
    incoming = list(messages)

    async def receive() -> dict:
        if not incoming:
            await asyncio.sleep(600)
        return incoming.pop(0)

    return Request({"type": "http"}, receive)


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            cancelled.set()

    with pytest.raises(ClientDisconnect):
        await generation.unless_disconnected(request_of({"type": "http.disconnect"}), work())
    assert cancelled.is_set()


async def test_work_that_is_done_gives_its_result_or_its_error() -> None:
    async def work(fail: bool) -> int:
        if fail:
            raise KeyError("x")
        return 5

    assert await generation.unless_disconnected(request_of(), work(False)) == 5
    with pytest.raises(KeyError):
        await generation.unless_disconnected(request_of(), work(True))
