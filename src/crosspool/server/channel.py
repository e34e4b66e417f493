"""The two ends of the pipes between the API process and the cell.

Each direction has a named pipe (fifo(7)) in a private folder, made by the API process. It never waits for the
cell: what a pipe does not take at once is kept, and follows when there is room. The cell waits for the API
process when a million bytes have not been read: its engine's thread does, and so its teams run out of work.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import shutil
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Lock

from crosspool.core.errors import ConfigError
from crosspool.core.ids import RequestId
from crosspool.core.request import EngineOutput
from crosspool.server.frames import Frame, FrameReader, cut
from crosspool.server.messages import Codec, Command, Event, Outputs

PIPE_BYTES = 2**20
"""What a pipe is asked to hold: the most that Linux gives an ordinary user."""


def _commands(path: str) -> str:
    return f"{path}.commands"


def _events(path: str) -> str:
    return f"{path}.events"


def remove_pipes(path: str) -> None:
    """Remove what an API process that was killed could not: its two pipes and their folder."""
    for pipe in (_commands(path), _events(path)):
        Path(pipe).unlink(missing_ok=True)
    with suppress(OSError):
        Path(path).parent.rmdir()


def _open_own(path: str) -> int:
    """Make a pipe and open it for both reading and writing, so that it is there before the other side is, and
    does not end with it."""
    os.mkfifo(path, 0o600)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with suppress(OSError):  # Beyond what the system allows this user: it is smaller then.
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return pipe


class ApiChannel:
    """The API process's end, for one event loop. Makes a private folder for the pipes and removes it when
    closed.

    Raises ConfigError if the system's folder for temporary files cannot hold pipes.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="crosspool-")
        self.path = str(Path(self._folder) / "cell")
        try:
            self._events, self._commands = _open_own(_events(self.path)), _open_own(_commands(self.path))
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ConfigError(f"no pipe can be made as {self.path}: {error.strerror}") from None
        self._codec = Codec()
        self._unsent: deque[bytes] = deque()
        self._frames = FrameReader()
        self._received: deque[Event] = deque()
        self._reading = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def send(self, command: Command) -> None:
        """Queue a command for the cell. Never waits."""
        waiting = bool(self._unsent)
        self._unsent.extend(cut(self._codec.encode(command)))
        if not waiting:
            self._write()
            if self._unsent:
                self._running_loop().add_writer(self._commands, self._write_rest)

    async def receive(self) -> Event:
        """The next event from the cell. Tokens that came together are one."""
        while not self._received:
            if not self._reading:
                self._running_loop().add_reader(self._events, self._read)
                self._reading = True
            self._waiter = self._running_loop().create_future()
            await self._waiter
        return self._received.popleft()

    def close(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._events)
            self._loop.remove_writer(self._commands)
        os.close(self._events)
        os.close(self._commands)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def _write(self) -> None:
        with suppress(BlockingIOError):
            while self._unsent:
                os.write(self._commands, self._unsent[0])
                self._unsent.popleft()

    def _write_rest(self) -> None:
        self._write()
        if not self._unsent:
            self._running_loop().remove_writer(self._commands)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            self._received.extend(self._to_events(self._frames.feed(os.read(self._events, PIPE_BYTES))))
        if self._received and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _to_events(self, frames: list[Frame]) -> list[Event]:
        events: list[Event] = []
        tokens: list[EngineOutput] = []
        for frame in frames:
            if isinstance(frame, tuple):
                tokens.append(EngineOutput(RequestId(frame[0]), frame[1:]))
                continue
            if tokens:
                events.append(Outputs(tuple(tokens)))
                tokens = []
            events.append(self._codec.event(frame))
        if tokens:
            events.append(Outputs(tuple(tokens)))
        return events


class CellChannel:
    """The cell's end: ``receive`` belongs to one thread, ``send`` may be called from any.

    ``tokens`` is the pipe's file descriptor for Executor.stream_to: tokens and messages go one way, in the
    order in which they are written.
    """

    def __init__(self, path: str) -> None:
        self._receiving = Codec()
        self._sending = Codec()
        self._send_lock = Lock()
        self._frames = FrameReader()
        self._received: deque[Command] = deque()
        self._commands = os.open(_commands(path), os.O_RDONLY)
        self.tokens = os.open(_events(path), os.O_WRONLY | os.O_NONBLOCK)
        self._room = select.poll()
        self._room.register(self.tokens, select.POLLOUT)

    def receive(self) -> Command:
        """The next command; blocks until there is one. Raises EOFError if the other end is closed."""
        while not self._received:
            data = os.read(self._commands, PIPE_BYTES)
            if not data:
                raise EOFError("the API process is gone")
            messages = self._frames.feed(data)
            self._received.extend(self._receiving.command(m) for m in messages if isinstance(m, bytes))
        return self._received.popleft()

    def send(self, event: Event) -> None:
        """Waits while the pipe is full. What nobody is left to read is dropped."""
        with self._send_lock, suppress(BrokenPipeError):
            for frame in cut(self._sending.encode(event)):
                self._write(frame)

    def close(self) -> None:
        """Close the way out; what is in it can still be read. A receive() under way stays."""
        with self._send_lock:
            os.close(self.tokens)

    def _write(self, frame: bytes) -> None:
        while True:
            try:
                os.write(self.tokens, frame)
                return
            except BlockingIOError:
                self._room.poll()
