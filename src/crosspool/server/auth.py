"""The API key: one bearer token for every route but /health."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from crosspool.server.errors import INVALID_REQUEST, ErrorResponse, error_body

OPEN_PATH = "/health"


class ApiKeyMiddleware:
    """Answers 401 to requests without the key. Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN_PATH and not self._has_key(scope):
            body = error_body("a valid API key is required", INVALID_REQUEST, code="invalid_api_key")
            response = ErrorResponse(body, 401, {"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)
