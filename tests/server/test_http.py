from __future__ import annotations

import asyncio
import socket

import pytest

from crosspool.server.config import LimitsConfig
from crosspool.server.http import listen, make_http_server

pytestmark = pytest.mark.integration

HUGE = 50_000_000


@pytest.mark.parametrize("finish", [True, False])
async def test_an_answer_that_is_not_read_does_not_keep_its_connection(
    monkeypatch: pytest.MonkeyPatch, finish: bool
) -> None:
    """Whether the answer was complete or given up half-way."""
    monkeypatch.setattr("crosspool.server.http.CLOSE_TIMEOUT", 0.1)

    reached = asyncio.Event()

    async def app(scope: object, receive: object, send: object) -> None:
        reached.set()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"x" * HUGE, "more_body": not finish})

    listener = listen("127.0.0.1", 0)
    server = make_http_server(app, LimitsConfig(), flush_timeout=1)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(20):
            await reached.wait()
            while server.server_state.connections:
                await asyncio.sleep(0.01)
    server.should_exit = True
    await serving
