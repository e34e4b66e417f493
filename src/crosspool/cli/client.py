"""Talks to a running server over its OpenAI-compatible API."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from crosspool.core.errors import ConfigError, CrossPoolError

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 660.0
"""Seconds between two pieces of an answer: above the time that a server lets a request wait in its queue."""

NOT_READY = 503


class ServerClient:
    """One server, as a context manager. Every method raises CrossPoolError with a sentence for the user, the
    constructor ConfigError for an API key that no server can have."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key must be printable ASCII text that is not empty")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
        with self._failures():
            self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout)

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """What /ready says of each configured model, whether it serves or not."""
        with self._failures():
            answer = self._http.get("/ready")
            if answer.status_code != NOT_READY:
                self._check(answer)
            entries: list[dict[str, Any]] = answer.json()["models"]
            return entries

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer of /v1/chat/completions."""
        with self._failures():
            answer = self._http.post("/v1/chat/completions", json=body)
            self._check(answer)
            completion: dict[str, Any] = answer.json()
            return completion

    def stream_chat(self, body: dict[str, Any]) -> Generator[str]:
        """The text of an answer, piece by piece. Closing the iterator early ends the request."""
        request = {**body, "stream": True}
        with self._failures(), self._http.stream("POST", "/v1/chat/completions", json=request) as answer:
            if answer.is_error:
                answer.read()
            self._check(answer)
            for line in _lines(answer.iter_bytes()):
                event = line.removeprefix("data: ")
                if event == "[DONE]":
                    return
                if event == line:
                    continue
                chunk = json.loads(event)
                if "error" in chunk:
                    raise CrossPoolError(f"{self._url} broke off: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
        raise CrossPoolError(f"the answer of {self._url} was cut off")

    def _check(self, answer: httpx.Response) -> None:
        if not answer.is_error:
            return
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.reason_phrase
        raise CrossPoolError(f"{self._url} answered {answer.status_code}: {message}")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise CrossPoolError(
                f"there is no server at {self._url}; start one with: crosspool serve --demo"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise CrossPoolError(f"no answer from {self._url}: {reason}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CrossPoolError(f"{self._url} does not answer as an OpenAI-compatible server") from error


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Lines as server-sent events have them; ``str.splitlines`` also splits at characters within a text."""
    begun = b""
    for chunk in chunks:
        *lines, begun = (begun + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()
