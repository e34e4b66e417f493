"""An OpenAI-compatible server under uvicorn whose models stream prepared tokens with known gaps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

EVENT_GAP = 0.002


@dataclass
class Behaviour:
    """How a model answers. ``slow_gap``: seconds before the third event; ``first``: before the first one.

    ``refuses`` are fields, ``"prompt ids"`` or ``"completions"`` that are answered with status 400.
    ``fail_every``: each so-manieth request after the first gets status 500. ``hang_up_after`` and
    ``error_after`` events, the connection is closed or an error event is sent, but not on the first request.
    """

    first: float = 0.0
    slow_gap: float = EVENT_GAP
    tokens_per_event: int = 1
    usage: bool = True
    short_by: int = 0
    refuses: tuple[str, ...] = ()
    status: int | None = None
    fail_every: int | None = None
    hang_up_after: int | None = None
    error_after: int | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    asked_at: list[float] = field(default_factory=list)


@dataclass
class StreamServer:
    models: dict[str, Behaviour] = field(default_factory=dict)
    keys: set[str | None] = field(default_factory=set)
    url: str = ""

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in self.models]})

    async def complete(self, request: Request) -> Response:
        self.keys.add(request.headers.get("Authorization"))
        body = await request.json()
        model = self.models.get(body["model"])
        if model is None:
            return _error(404, f"no model {body['model']}")
        chat = "messages" in body
        given = {*body, *(["prompt ids"] if isinstance(body.get("prompt"), list) else [])}
        given |= set() if chat else {"completions"}
        refused = given & set(model.refuses)
        if refused:
            return _error(400, f"{min(refused)} is not supported")
        if model.status is not None:
            return _error(model.status, "no answer from this one")
        model.bodies.append(body)
        model.asked_at.append(asyncio.get_running_loop().time())
        number = len(model.bodies) - 1
        if model.fail_every and number and number % model.fail_every == 0:
            return _error(500, "lost it")
        return StreamingResponse(_stream(model, body, chat, number), media_type="text/event-stream")


async def _stream(
    model: Behaviour, body: dict[str, Any], chat: bool, number: int
) -> AsyncGenerator[str, None]:
    tokens = body["max_tokens"] - model.short_by
    await asyncio.sleep(model.first)
    if chat:
        yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for index in range(-(-tokens // model.tokens_per_event)):
        if number and index == model.hang_up_after:
            raise ConnectionResetError("hung up")
        if number and index == model.error_after:
            yield _event({"error": {"message": "the engine process ended"}})
            return
        if index:
            await asyncio.sleep(model.slow_gap if index == 2 else EVENT_GAP)
        choice = {"delta": {"content": "a\u2028b"}} if chat else {"text": "a\u2028b"}
        yield _event({"choices": [choice], "usage": None})
    yield _event({"choices": [{"text": "", "finish_reason": "length"}]})
    if model.usage and body.get("stream_options"):
        prompt = body["messages"][0]["content"].split() if chat else body["prompt"]
        prompt = prompt.split() if isinstance(prompt, str) else prompt
        yield _event({"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": tokens}})
    yield "data: [DONE]\n\n"


def _event(content: object) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


@contextmanager
def stream_server(**models: Behaviour) -> Iterator[StreamServer]:
    server = StreamServer(dict(models))
    routes = [
        Route("/v1/models", server.list_models),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/chat/completions", server.complete, methods=["POST"]),
    ]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, lifespan="off", ws="none")
    runner = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()  # so that clients wait until the server has started, instead of being refused
    server.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield server
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join()
        socket.close()
