"""Errors as HTTP: status, OpenAI's error shape, and nothing of the inside of the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from crosspool.core.errors import (
    CrossPoolError,
    EngineDeadError,
    ModelNotFoundError,
    ModelUnavailableError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
CLIENT_CLOSED_REQUEST = 499
NOT_JSON = "the body must be JSON, sent with the header Content-Type: application/json"


class ErrorResponse(JSONResponse):
    """JSON in ASCII: a message may quote what the client sent, and half a surrogate pair has no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def error_body(
    message: str, kind: str, *, parameter: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for an error. What is not in the public tree is only said to be internal."""
    match error:
        case ModelNotFoundError():
            parameter = error.parameter or "model"
            return 404, error_body(str(error), INVALID_REQUEST, parameter=parameter, code="model_not_found")
        case RequestTooLargeError():
            code = "context_length_exceeded"
            return 400, error_body(str(error), INVALID_REQUEST, parameter=error.parameter, code=code)
        case RequestError():
            return 400, error_body(str(error), INVALID_REQUEST, parameter=error.parameter)
        case OverloadedError():
            return 503, error_body(str(error), SERVER_ERROR, code="overloaded")
        case ModelUnavailableError():
            return 503, error_body(str(error), SERVER_ERROR, parameter="model", code="model_unavailable")
        case EngineDeadError():
            return 503, error_body(str(error), SERVER_ERROR, code="engine_unavailable")
        case HTTPException():
            kind = INVALID_REQUEST if error.status_code < 500 else SERVER_ERROR
            return error.status_code, error_body(str(error.detail), kind)
        case _:
            return 500, error_body("internal error", SERVER_ERROR, code="internal_error")


def error_response(error: Exception, retry_after: int) -> ErrorResponse:
    """The whole answer. Clients that may try again are told after how many seconds."""
    status, body = describe(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, OverloadedError | EngineDeadError):
        headers["Retry-After"] = str(retry_after)
    return ErrorResponse(body, status, headers)


def error_event(error: Exception) -> bytes:
    """The server-sent event that ends a stream which cannot go on."""
    return b"data: " + json.dumps(describe(error)[1]).encode() + b"\n\n"


def validation_error(problems: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body for a request that is not of the declared shape, naming the first field at fault."""
    first = _field(problems[0])
    messages = dict.fromkeys(problem["msg"] for problem in problems if _field(problem) == first)
    text = "; or ".join(messages)
    return error_body(f"{first}: {text}" if first else text, INVALID_REQUEST, parameter=first)


def _field(problem: Mapping[str, Any]) -> str | None:
    """The path of the field in the body, without the names of union members."""
    path: list[str] = []
    for part in problem["loc"][1:]:
        if isinstance(part, int):
            if path:
                path[-1] += f"[{part}]"
        elif part.isidentifier() and not (path and part in ("str", "int", "float", "bool")):
            path.append(part)
        else:
            break
    return ".".join(path) or None


def install(app: FastAPI, retry_after: int) -> None:
    """Make every error of the application answer in OpenAI's shape."""

    async def expected(_: Request, error: Exception) -> ErrorResponse:
        return error_response(error, retry_after)

    async def unexpected(_: Request, error: Exception) -> ErrorResponse:
        response = error_response(error, retry_after)
        response.headers["Connection"] = "close"  # which is what the HTTP server does after an exception
        return response

    async def invalid(_: Request, error: Exception) -> ErrorResponse:
        assert isinstance(error, RequestValidationError)
        if isinstance(error.body, bytes):
            return ErrorResponse(error_body(NOT_JSON, INVALID_REQUEST), 400)
        return ErrorResponse(validation_error(error.errors()), 400)

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(CrossPoolError, expected)
    app.add_exception_handler(HTTPException, expected)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)
