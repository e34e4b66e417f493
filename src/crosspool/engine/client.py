"""How a front (the server, the async LLM) talks to an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from crosspool.core.ids import RequestId
from crosspool.core.info import EngineInfo, EngineStats
from crosspool.core.request import EngineOutput, Request


class EngineClient(Protocol):
    """One engine, in this process or another. Used from one event loop."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: Request) -> AsyncIterator[EngineOutput]:
        """Run one request and yield what is new, until an output with a finish reason.

        The front chooses ``request.id`` (each id once); the engine stamps ``request.arrival``. Closing the
        iterator early aborts the request. Raises RequestTooLargeError, OverloadedError,
        ModelUnavailableError or EngineDeadError.
        """
        ...

    def finish(self, request: RequestId, at_token: int) -> None:
        """End a request with FinishReason.STOP after its first ``at_token`` output tokens.

        For stop strings, which only the front can see. Tokens made beyond that are dropped.
        """
        ...

    def abort(self, request: RequestId) -> None:
        """End a request with FinishReason.ABORT and free what it holds. Unknown ids are ignored."""
        ...

    async def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
