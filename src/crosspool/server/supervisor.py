"""Keeps one cell running: starts it, notices when it dies or hangs, and starts the next."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import StrEnum

from crosspool.core.config import EngineConfig
from crosspool.core.errors import CrossPoolError, EngineDeadError
from crosspool.core.info import LoadProgress
from crosspool.server import messages
from crosspool.server.channel import ApiChannel
from crosspool.server.config import SupervisionConfig
from crosspool.server.remote_engine import RemoteEngine

CELL_COMMAND = (sys.executable, "-P", "-m", "crosspool.server.cell")
HEARTBEATS_PER_TIMEOUT = 30
HEARTBEAT = -1
LAST_WORDS = 0.2
FIRST_DELAY = 0.25

logger = logging.getLogger(__name__)


class EngineState(StrEnum):
    """What the engine process is doing. DEAD: it keeps dying, though starting it is still tried."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"


class Supervisor:
    """Owns the cell's process and tells ``engine`` which channel leads to it.

    ``progress`` hears of loading. A new engine counts as READY when ``on_ready``, which finds it behind
    ``engine``, has come to its end. Both run on the event loop.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        config: EngineConfig,
        supervision: SupervisionConfig,
        *,
        progress: Callable[[LoadProgress], None],
        on_ready: Callable[[], Awaitable[None]],
        cell_command: Sequence[str] = CELL_COMMAND,
    ) -> None:
        self.state = EngineState.LOADING
        self._engine = engine
        self._config = config
        self._limits = supervision
        self._progress = progress
        self._on_ready = on_ready
        self._command = cell_command
        self._ready_since: float | None = None
        self._signs_of_life = 0
        self._early_deaths = 0

    async def run(self) -> None:
        """Run one cell after another until cancelled.

        Raises what the first cell failed with if it never became ready (ConfigError, ModelLoadError,
        EngineDeadError): that is the operator's to mend, and starting again would not help.
        """
        while True:
            error = await self._run_cell()
            if self.state is EngineState.LOADING:
                raise error
            delay = self._note_death()
            logger.error("%s; starting it again in %g s", error, delay)
            await asyncio.sleep(delay)

    async def _run_cell(self) -> CrossPoolError:
        """Run one cell to its end and say why it ended."""
        self._ready_since = None
        channel = ApiChannel()
        process: Process | None = None
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *("--socket", channel.path, "--parent", str(os.getpid())),
                stdin=DEVNULL,
                start_new_session=True,
            )
            channel.send(messages.Start(self._config))
            return await self._follow(process, channel)
        finally:
            self._engine.detach(EngineDeadError("the engine process ended; the request is lost"))
            if self.state is EngineState.READY:
                self.state = EngineState.RESTARTING
            if process is not None and process.returncode is None:
                await self._end(process, channel)
            channel.close()

    async def _follow(self, process: Process, channel: ApiChannel) -> CrossPoolError:
        """Serve the cell's events until it says that it failed, exits, or hangs (then it is killed)."""
        reader = asyncio.create_task(self._read(channel))
        exited = asyncio.create_task(process.wait())
        watchdog = asyncio.create_task(self._watch(channel))
        try:
            await asyncio.wait({reader, exited, watchdog}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                await asyncio.wait({reader}, timeout=LAST_WORDS)
            if reader.done():
                return reader.result()
            if watchdog.done():
                _kill(process)
                return watchdog.result()
            return EngineDeadError(f"the engine process ended {_how(exited.result())}")
        finally:
            for task in (reader, exited, watchdog):
                task.cancel()

    async def _read(self, channel: ApiChannel) -> CrossPoolError:
        while True:
            event = await channel.receive()
            match event:
                case messages.Outputs() | messages.Rejected():
                    self._engine.deliver(event)
                case messages.Failed():
                    return messages.to_error(event)
                case messages.Progress(progress):
                    self._signs_of_life += 1
                    self._progress(progress)
                case messages.Ready(info):
                    self._signs_of_life += 1
                    self._engine.attach(channel, info)
                    await self._on_ready()
                    self._ready_since = time.monotonic()
                    self.state = EngineState.READY
                case messages.Stats():
                    self._signs_of_life += 1
                    self._engine.deliver(event)

    async def _watch(self, channel: ApiChannel) -> EngineDeadError:
        """Return when the cell has shown no sign of life for too long.

        Silence is counted in heartbeats, not by the clock: time that this process was itself held up in does
        not count against the cell.
        """
        interval = self._limits.hang_timeout / HEARTBEATS_PER_TIMEOUT
        silence, seen = 0.0, self._signs_of_life
        while True:
            ready = self._ready_since is not None
            if ready:
                channel.send(messages.StatsQuery(HEARTBEAT))
            await asyncio.sleep(interval)
            silence = silence + interval if seen == self._signs_of_life else 0.0
            seen = self._signs_of_life
            if silence >= (self._limits.hang_timeout if ready else self._limits.load_timeout):
                what = "did not answer" if ready else "reported no progress in loading"
                return EngineDeadError(f"the engine process {what} for {silence:.0f} s and was killed")

    def _note_death(self) -> float:
        """Count a death and return how long to wait before the next start."""
        ready_since = self._ready_since
        stable = ready_since is not None and time.monotonic() - ready_since >= self._limits.stable_after
        self._early_deaths = 0 if stable else self._early_deaths + 1
        self.state = (
            EngineState.DEAD if self._early_deaths >= self._limits.dead_after else EngineState.RESTARTING
        )
        return min(self._limits.max_restart_delay, FIRST_DELAY * 2.0 ** min(self._early_deaths, 10))

    async def _end(self, process: Process, channel: ApiChannel) -> None:
        """End a cell: in order when it is ready, at once when it is still loading or does not comply."""
        if self._ready_since is None:
            _kill(process)
        else:
            channel.send(messages.Shutdown())
        try:
            await asyncio.wait_for(process.wait(), self._limits.shutdown_timeout)
        except TimeoutError:
            _kill(process)
            await process.wait()


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()


def _how(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with status {status}"
