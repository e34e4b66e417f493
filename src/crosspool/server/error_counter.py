"""Counts the answers that are errors, whoever gives them."""

from __future__ import annotations

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROBES = ("/health", "/ready")


class ErrorCounterMiddleware:
    """Counts answers with a status of 400 or above in ``counter``, by status.

    An exception becomes a 500 further out. Probes are left out: they ask for the state of the server.
    """

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self._app = app
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        started = False

        async def count_and_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    self._counter.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, receive, count_and_send)
        except Exception:
            if not started:
                self._counter.labels("500").inc()
            raise
