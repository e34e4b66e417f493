"""The two ends of the Unix sockets between the API process and the cell.

Each direction has its own socket: the receiver binds, the sender connects. A connecting ZeroMQ sender queues
what the other side has not read yet, so sending never waits. The number of messages is bounded by the
requests that the API process admits.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Lock

import zmq
import zmq.asyncio

from crosspool.core.errors import ConfigError
from crosspool.server.messages import Codec, Command, Event

NO_LIMIT = 0


def _commands(path: str) -> str:
    return f"ipc://{path}.commands"


def _events(path: str) -> str:
    return f"ipc://{path}.events"


def remove_sockets(path: str) -> None:
    """Remove what an API process that was killed could not: its two sockets and their folder."""
    for address in (_commands(path), _events(path)):
        Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
    with suppress(OSError):
        Path(path).parent.rmdir()


class ApiChannel:
    """The API process's end. Makes a private folder for the sockets and removes it when closed.

    Raises ConfigError if the system's folder for temporary files cannot hold Unix sockets.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="crosspool-")
        self.path = str(Path(self._folder) / "cell")
        self._codec = Codec()
        self._context = zmq.asyncio.Context()
        self._events = self._context.socket(zmq.PULL)
        self._events.set_hwm(NO_LIMIT)
        try:
            self._events.bind(_events(self.path))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ConfigError(f"no Unix socket can be made as {self.path}: {error.strerror}") from None
        self._commands: zmq.Socket[bytes] = zmq.Context.shadow(self._context).socket(zmq.PUSH)
        self._commands.set_hwm(NO_LIMIT)
        self._commands.connect(_commands(self.path))

    def send(self, command: Command) -> None:
        """Queue a command for the cell. Never waits."""
        self._commands.send(self._codec.encode(command), zmq.NOBLOCK)

    async def receive(self) -> Event:
        """The next event from the cell."""
        return self._codec.event(await self._events.recv())

    def close(self) -> None:
        self._commands.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


class CellChannel:
    """The cell's end: ``receive`` belongs to one thread, ``send`` may be called from any."""

    def __init__(self, path: str) -> None:
        self._receiving = Codec()
        self._sending = Codec()
        self._send_lock = Lock()
        self._commands = zmq.Context().socket(zmq.PULL)
        self._commands.set_hwm(NO_LIMIT)
        self._commands.bind(_commands(path))
        self._events_context = zmq.Context()
        self._events = self._events_context.socket(zmq.PUSH)
        self._events.set_hwm(NO_LIMIT)
        self._events.connect(_events(path))

    def receive(self) -> Command:
        """The next command; blocks until there is one."""
        return self._receiving.command(self._commands.recv())

    def send(self, event: Event) -> None:
        with self._send_lock:
            self._events.send(self._sending.encode(event))

    def close(self, linger: float) -> None:
        """Close the way out, giving events ``linger`` seconds to leave. A receive() under way stays."""
        with self._send_lock:
            self._events.close(linger=round(linger * 1000))
            self._events_context.term()
