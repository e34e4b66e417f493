"""Serve: the supervisor and the HTTP server together, from start to the end of the drain."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

import uvloop

from crosspool.core.config import EngineConfig
from crosspool.core.errors import EngineDeadError
from crosspool.core.info import EngineInfo, LoadProgress
from crosspool.llm import AsyncLLM
from crosspool.metrics.prometheus import Exposition
from crosspool.server.app import create_app
from crosspool.server.config import ServerConfig
from crosspool.server.http import listen, make_http_server
from crosspool.server.limits import Admission
from crosspool.server.remote_engine import RemoteEngine
from crosspool.server.state import ServerState
from crosspool.server.supervisor import CELL_COMMAND, Supervisor

FLUSH_TIMEOUT = 2
DRAIN_POLL = 0.05

ProgressCallback = Callable[[LoadProgress], None]
ReadyCallback = Callable[[EngineInfo, str], None]


def serve(
    engine: EngineConfig,
    server: ServerConfig,
    progress: ProgressCallback | None = None,
    on_ready: ReadyCallback | None = None,
    *,
    cell_command: Sequence[str] = CELL_COMMAND,
) -> int:
    """Serve until SIGTERM or SIGINT and return the exit status, 0.

    The first signal drains: running requests may finish; a second ends them. ``progress`` hears of loading,
    ``on_ready`` gets the engine and the server's URL when requests are served. Raises ConfigError, before
    any model is loaded if the address cannot be had, ModelLoadError if no model can be loaded, and
    EngineDeadError if the engine process ends while it loads.
    """
    listener = listen(server.host, server.port)
    serving = _Serving(engine, server, listener, progress, on_ready, cell_command)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serving.run())


class _Serving:
    """One run of the server."""

    def __init__(
        self,
        engine: EngineConfig,
        server: ServerConfig,
        listener: socket.socket,
        progress: ProgressCallback | None,
        on_ready: ReadyCallback | None,
        cell_command: Sequence[str],
    ) -> None:
        limits = server.limits
        most = min(limits.max_choices, engine.scheduler.max_waiting)
        server = replace(server, limits=replace(limits, max_choices=most))
        self._config = server
        self._listener = listener
        self._progress = progress
        self._on_ready = on_ready
        self._engine = RemoteEngine()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._supervisor = Supervisor(
            self._engine,
            engine,
            server.supervision,
            progress=self._note_progress,
            on_ready=self._open,
            cell_command=cell_command,
        )
        self._state = ServerState(
            config=server,
            engine_state=lambda: self._supervisor.state,
            metrics=Exposition(),
            admission=Admission(server.limits),
        )
        self._http = make_http_server(create_app(self._state), server.limits, FLUSH_TIMEOUT)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note_signal)
        web = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        cells = asyncio.create_task(self._supervisor.run())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({web, cells, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (web, cells):
                if task.done():
                    task.result()
            await self._drain()
        finally:
            self._http.should_exit = True
            await asyncio.gather(web, return_exceptions=True)
            await self._end_engine(cells, stopping)
        return 0

    async def _open(self) -> None:
        """Open the front, and again for each further engine, which may know its models otherwise."""
        llm = self._state.open_llm
        if llm is None:
            self._state.open_llm = await AsyncLLM.open(self._engine)
            # Modules, routes and tokenizers stay; without them a collection is short.
            gc.freeze()
            if self._on_ready is not None:
                self._on_ready(self._engine.info, self._url())
        else:
            await llm.reopen()
        self._state.metrics.engine_starts.inc()

    async def _drain(self) -> None:
        """Let no request in any more, and those that run finish in their time."""
        admission = self._state.admission
        admission.close()
        await self._wait_until_idle(self._config.drain_timeout, self._hurry)
        if admission.requests:
            self._engine.detach(EngineDeadError("the server was shut down before the request had finished"))
            await self._wait_until_idle(FLUSH_TIMEOUT)

    async def _wait_until_idle(self, timeout: float, hurry: asyncio.Event | None = None) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while self._state.admission.requests and loop.time() < end and not (hurry and hurry.is_set()):
            await asyncio.sleep(DRAIN_POLL)

    async def _end_engine(self, *tasks: asyncio.Task[object]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._state.open_llm is not None:
            await self._state.open_llm.close()

    def _note_progress(self, progress: LoadProgress) -> None:
        self._state.loading[progress.model] = progress
        if self._progress is not None:
            self._progress(progress)

    def _note_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
