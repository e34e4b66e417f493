"""The listening socket, and uvicorn with a time limit for headers and without its signal handlers."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from crosspool.core.errors import ConfigError
from crosspool.server.config import LimitsConfig

BACKLOG = 2048
KEEP_ALIVE = 30


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError if the address cannot be had, a port in use above all."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use by another process") from None
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


class TimedProtocol(H11Protocol):
    """HTTP/1.1 whose client must send the headers of a request within ``header_timeout`` seconds."""

    def __init__(self, *, header_timeout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._header_timeout = header_timeout
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:
            self._start_header_timer()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._header_timeout, self.transport.close)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the server drains first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(app: ASGIApp, limits: LimitsConfig, flush_timeout: int) -> HttpServer:
    """A server for ``app``. When it is told to exit, answers have ``flush_timeout`` seconds to leave."""
    protocol = partial(TimedProtocol, header_timeout=limits.header_timeout)
    return HttpServer(
        uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], protocol),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=flush_timeout,
            h11_max_incomplete_event_size=limits.max_header_bytes,
        )
    )
