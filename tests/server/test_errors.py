from __future__ import annotations

import json

import pytest

from crosspool.core import errors as core
from crosspool.core.request import EngineOutput, FinishReason
from crosspool.server.errors import describe, error_event, error_response
from helpers_fake_engine import CRASHING_SEED
from helpers_sse import read_events

pytestmark = pytest.mark.integration

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (core.InvalidRequestError("x", parameter="n"), 400, None),
        (core.RequestTooLargeError("x"), 400, "context_length_exceeded"),
        (core.ModelNotFoundError("x"), 404, "model_not_found"),
        (core.OverloadedError("x"), 503, "overloaded"),
        (core.ModelUnavailableError("x"), 503, "model_unavailable"),
        (core.EngineDeadError("x"), 503, "engine_unavailable"),
        (core.InvariantError("x"), 500, "internal_error"),
        (KeyError("x"), 500, "internal_error"),
    ],
)
def test_every_error_has_its_status(error: Exception, status: int, code: str | None) -> None:
    got, body = describe(error)
    assert (got, body["error"]["code"]) == (status, code)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["message"] == "x") == (status < 500 or status == 503)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"3", b"null"])
async def test_a_body_that_is_no_object_is_refused(application, content: bytes) -> None:
    response = await application.client.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
async def test_a_body_of_another_content_type_is_told_which_is_needed(application, headers: dict) -> None:
    content = b'{"model": "tiny", "prompt": "a"}'
    response = await application.client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


async def test_a_message_may_quote_half_a_surrogate_pair(application) -> None:
    content = b'{"model": "\\ud800", "prompt": "a"}'
    response = await application.client.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 404
    assert "'\\ud800'" in response.json()["error"]["message"]
    event = error_event(core.InvalidRequestError("\ud800"))
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "\ud800"
    assert json.loads(error_response(core.InvalidRequestError("\ud800"), 1).body)


async def test_a_number_that_is_not_finite_is_refused(application) -> None:
    content = b'{"model": "tiny", "prompt": "a", "temperature": NaN}'
    response = await application.client.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 404)],
)
async def test_unknown_routes_and_methods_answer_in_the_same_shape(
    application, method: str, path: str, status: int
) -> None:
    response = await application.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_bug_tells_clients_nothing_of_the_inside(
    application, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(application.state.open_llm, "with_front", broken)
    response = await application.post("/tokenize", model="tiny", prompt="a")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error"
    assert response.headers["Connection"] == "close"
    assert "secret" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_the_first_token_is_a_503(application, stream: bool) -> None:
    response = await application.post(
        "/v1/completions", model="tiny", prompt="a", seed=CRASHING_SEED, stream=stream
    )
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert "secret" not in response.text


async def test_a_full_engine_refuses_a_stream_with_a_status(application) -> None:
    response = await application.post("/v1/completions", model="tiny", prompt=["a"] * 9, stream=True)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    application, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = application.engine.step

    def failing() -> list[EngineOutput]:
        outputs = step()
        if application.engine._sequences and next(iter(application.engine._sequences.values())).made > 2:
            request = next(iter(application.engine._sequences))
            outputs.append(EngineOutput(request, (), finish_reason=FinishReason.ERROR, error="/secret/path"))
        return outputs

    monkeypatch.setattr(application.engine, "step", failing)
    response = await application.post(
        "/v1/completions", model="tiny", prompt="abc", max_tokens=500, stream=True
    )
    assert response.status_code == 200
    *chunks, last = read_events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in response.text
