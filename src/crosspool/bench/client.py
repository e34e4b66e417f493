"""One streamed request: when it was sent, when each event with text came, what the server counted.

Times are seconds of ``time.perf_counter``. All events that arrive in one piece have the same time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from crosspool.bench.exchange import EndedEarlyError, post
from crosspool.bench.sse import EventLines
from crosspool.core.errors import ConfigError

NO_CONNECTION = "no connection"
CUT_OFF = "cut off"
TIMEOUT = "timeout"
ERROR_EVENT = "error event"
NOT_OPENAI = "not an OpenAI-compatible answer"

MESSAGE_CHARACTERS = 500
TEXT_FIELDS = ("content", "reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True)
class Request:
    """What is posted: JSON that asks ``model`` for a stream of at most ``output_tokens``.

    ``path`` comes after the client's URL, or is a whole URL.
    """

    model: str
    path: str
    body: bytes
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """``kind`` is one of the constants of this module or ``HTTP`` with a status; ``message`` has details."""

    kind: str
    message: str


@dataclass(slots=True)
class Record:
    """What became of one request.

    ``due``: when it was to be sent; ``sent``: when it was. ``events``: when text came. ``ended``: when the
    stream came to its end or failed; None while it runs, and for ever if it was cancelled. The counts of
    tokens are the server's; None if it gave none.
    """

    model: str
    wanted_tokens: int
    due: float
    sent: float
    events: list[float] = field(default_factory=list)
    ended: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    failure: Failure | None = None

    @property
    def finished(self) -> bool:
        return self.ended is not None and self.failure is None

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [later - earlier for earlier, later in zip(self.events, self.events[1:], strict=False)]

    @property
    def tokens(self) -> int:
        """The server's count, or where there is none, the events: each has a token at least."""
        return len(self.events) if self.output_tokens is None else self.output_tokens


@dataclass(frozen=True, slots=True)
class Client:
    """Where requests go, and the headers that go with them. Without ``url`` requests name their servers."""

    url: httpx.URL
    headers: Mapping[str, str]

    def url_of(self, request: Request) -> httpx.URL:
        """Raises httpx.InvalidURL."""
        if request.path.startswith("/"):
            return self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + request.path.encode())
        return httpx.URL(request.path)


def new_client(url: str = "", api_key: str | None = None) -> Client:
    """Raises ConfigError."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ConfigError("the API key must be printable ASCII text that is not empty")
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        return Client(httpx.URL(url.rstrip("/")), headers)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is not a URL: {error}") from error


async def send(
    client: Client,
    request: Request,
    *,
    due: float | None = None,
    timeout: float | None = None,
    record: Record | None = None,
) -> Record:
    """Send a request and read its stream to the end. What goes wrong is in the record, not raised.

    ``timeout``: seconds from sending to the end. Whoever cancels it finds in ``record`` what came until then.
    """
    sent = time.perf_counter()
    if record is None:
        record = Record(request.model, request.output_tokens, sent, sent)
    record.sent, record.due = sent, sent if due is None else due
    try:
        async with asyncio.timeout(timeout):
            await _follow(client, request, record)
    except _StreamError as error:
        _fail(record, error.kind, str(error))
    except TimeoutError:
        _fail(record, TIMEOUT, f"no end after {timeout:g} s")
    except (OSError, ValueError) as error:
        _fail(record, NO_CONNECTION, str(error) or type(error).__name__)
    except EndedEarlyError as error:
        _fail(record, CUT_OFF, str(error))
    return record


class _StreamError(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _fail(record: Record, kind: str, message: str) -> None:
    """What happens after ``[DONE]`` is no failure any more."""
    if record.ended is None:
        record.ended = time.perf_counter()
        record.failure = Failure(kind, message[:MESSAGE_CHARACTERS])


async def _follow(client: Client, request: Request, record: Record) -> None:
    lines = EventLines()
    refusal: list[bytes] = []

    def take(status: int, piece: bytes) -> None:
        now = time.perf_counter()
        if status != 200:
            refusal.append(piece)
            return
        for data in lines.feed(piece):
            if data == b"[DONE]":
                record.ended = now
            elif record.ended is None:
                _take(record, now, data)

    status = await post(client.url_of(request), client.headers, request.body, take)
    if status != 200:
        raise _StreamError(f"HTTP {status}", _error_text(b"".join(refusal)))
    if record.ended is None:
        raise _StreamError(CUT_OFF, "the stream ended without [DONE]")


def _take(record: Record, now: float, data: bytes) -> None:
    try:
        event = json.loads(data)
        if event.get("error"):
            raise _StreamError(ERROR_EVENT, _message(event["error"]))
        if any(_has_text(choice) for choice in event["choices"]):
            record.events.append(now)
        if usage := event.get("usage"):
            record.prompt_tokens = int(usage["prompt_tokens"])
            record.output_tokens = int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _StreamError(NOT_OPENAI, data.decode(errors="replace")) from error


def _has_text(choice: Mapping[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in TEXT_FIELDS)


def _error_text(body: bytes) -> str:
    try:
        return _message(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _message(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
