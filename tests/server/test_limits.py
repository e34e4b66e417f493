from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.exceptions import HTTPException

from crosspool.core.errors import ConfigError, OverloadedError
from crosspool.server.config import LimitsConfig, ServerConfig, SupervisionConfig
from crosspool.server.limits import Admission, GateMiddleware
from helpers_polling import wait_until

pytestmark = pytest.mark.integration

LIMITS = LimitsConfig(max_requests=2, max_body_bytes=600, max_admitted_bytes=1000, retry_after=7)
LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 800}


@pytest.fixture
async def limited(start_application):
    return await start_application(ServerConfig(limits=LIMITS))


async def in_progress(application, *bodies: dict) -> list[asyncio.Task]:
    """Requests that run until they are cancelled."""
    tasks = [asyncio.create_task(application.post("/v1/completions", **body)) for body in bodies]
    admission = application.state.admission
    await wait_until(lambda: admission.requests == len(tasks) and admission.bytes > 0, "not admitted", 10)
    return tasks


async def cancel(tasks: list[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_beyond_the_number_of_requests_clients_are_told_to_come_back(limited) -> None:
    tasks = await in_progress(limited, LONG, LONG)
    refused = await limited.post("/v1/completions", **LONG)
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "7"
    assert refused.json()["error"]["code"] == "overloaded"
    assert (await limited.client.get("/ready")).status_code == 200
    metrics = (await limited.client.get("/metrics")).text
    assert 'crosspool_error_responses_total{status="503"} 1.0' in metrics
    await cancel(tasks)
    assert (await limited.post("/v1/completions", model="tiny", prompt="a")).status_code == 200


async def test_beyond_the_bytes_in_progress_clients_are_told_to_come_back(limited) -> None:
    padded = {**LONG, "user": "x" * 500}
    tasks = await in_progress(limited, padded)
    refused = await limited.post("/v1/completions", **padded)
    assert refused.status_code == 503
    assert "bytes" in refused.json()["error"]["message"]
    await cancel(tasks)
    assert (limited.state.admission.requests, limited.state.admission.bytes) == (0, 0)


async def test_too_large_a_body_is_refused_by_its_declared_length(limited) -> None:
    response = await limited.post("/v1/completions", **{**LONG, "user": "x" * 600})
    assert response.status_code == 413
    assert "600" in response.json()["error"]["message"]
    assert limited.state.admission.bytes == 0


async def test_too_large_a_body_is_refused_though_its_length_is_not_declared(limited) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100
            yield b" " * 100

    response = await limited.client.post("/v1/completions", content=endless())
    assert response.status_code == 413
    assert sent <= LIMITS.max_body_bytes + 200


async def test_a_body_that_does_not_arrive_is_not_waited_for(start_application) -> None:
    application = await start_application(ServerConfig(limits=LimitsConfig(body_timeout=0.2)))

    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    response = await application.client.post("/v1/completions", content=stalled())
    assert response.status_code == 408
    assert application.state.admission.requests == 0


async def test_a_client_that_leaves_while_it_sends_its_body_is_forgotten() -> None:
    admission, reached = Admission(LIMITS), []
    gate = GateMiddleware(lambda *_: reached.append(1), admission, LIMITS)
    incoming = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict:
        return next(incoming)

    async def send(message: dict) -> None:
        reached.append(message)

    await gate({"type": "http", "method": "POST", "headers": []}, receive, send)
    assert reached == []
    assert (admission.requests, admission.bytes) == (0, 0)


async def through_the_gate(app: object, limits: LimitsConfig, method: str = "POST") -> list[dict]:
    """What is sent to a client, with nothing left in progress."""
    admission, sent = Admission(limits), []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    gate = GateMiddleware(app, admission, limits)
    try:
        async with asyncio.timeout(30):
            await gate({"type": "http", "method": method, "headers": []}, receive, send)
    finally:
        assert admission.requests == 0
    return sent


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_client_that_does_not_read_its_answer_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("crosspool.server.limits.GRACE", 0.1)
    start = {"type": "http.response.start", "status": 200, "headers": []}

    async def app(scope: object, receive: object, send: object) -> None:
        await send(start)
        await asyncio.sleep(600)

    assert await through_the_gate(app, LimitsConfig(total_timeout=0.1), method) == [start]


async def test_a_request_without_an_answer_in_time_is_told_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("crosspool.server.limits.GRACE", 0.1)

    async def app(scope: object, receive: object, send: object) -> None:
        await asyncio.sleep(600)

    start, body = await through_the_gate(app, LimitsConfig(total_timeout=0.1))
    assert start["status"] == 503
    assert b"longer than 0.1 s" in body["body"]


async def test_a_timeout_of_the_applications_own_is_not_taken_for_the_limit() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        await through_the_gate(app, LimitsConfig())


def test_an_error_in_a_request_gives_back_what_it_held() -> None:
    admission = Admission(LIMITS)
    with pytest.raises(KeyError), admission.request() as admitted:
        admitted.grow(300)
        admitted.grow(500)
        assert (admission.requests, admission.bytes) == (1, 500)
        raise KeyError
    assert (admission.requests, admission.bytes) == (0, 0)


def test_what_was_refused_is_not_counted() -> None:
    admission = Admission(LIMITS)
    with admission.request() as admitted:
        with pytest.raises(HTTPException):
            admitted.grow(601)
        assert admission.bytes == 0
        admitted.grow(600)
        with admission.request() as second:
            with pytest.raises(OverloadedError):
                second.grow(401)
            second.grow(400)
        assert admission.bytes == 600


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ServerConfig, {"port": 65536}),
        (ServerConfig, {"port": -1}),
        (ServerConfig, {"api_key": ""}),
        (ServerConfig, {"api_key": "é"}),
        (ServerConfig, {"drain_timeout": -1}),
        (LimitsConfig, {"max_requests": 0}),
        (LimitsConfig, {"total_timeout": 0}),
        (LimitsConfig, {"max_body_bytes": 2000, "max_admitted_bytes": 1000}),
        (SupervisionConfig, {"hang_timeout": 0}),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(kind: type, fields: dict) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(fields))).replace("api_key", "API key")):
        kind(**fields)


def test_the_api_key_is_not_shown() -> None:
    assert "secret" not in repr(ServerConfig(api_key="secret"))
