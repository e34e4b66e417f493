"""The cell: the child process that holds one engine, its devices, pools and models.

The main thread owns the engine; a second thread receives commands and wakes it; a third ends the process when
the API process is gone. SIGINT and SIGTERM are ignored: a terminal or a service manager sends them to every
process of the group, and it is the API process that drains and then shuts the cell down.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Protocol

from crosspool.build.start import start_engine
from crosspool.core.config import EngineConfig
from crosspool.core.errors import CrossPoolError
from crosspool.core.ids import RequestId
from crosspool.core.info import EngineInfo, EngineStats, LoadProgress
from crosspool.core.request import EngineOutput, Request
from crosspool.server import messages
from crosspool.server.channel import CellChannel, remove_pipes

IDLE_WAIT = 0.5
PARENT_POLL = 0.5

logger = logging.getLogger(__name__)


class CellEngine(Protocol):
    """What a cell needs of an engine; engine.engine.Engine is one."""

    @property
    def info(self) -> EngineInfo: ...

    def add(self, request: Request) -> None: ...

    def finish(self, request: RequestId, at_token: int) -> None: ...

    def abort(self, request: RequestId) -> None: ...

    def stream_to(self, pipe: int) -> None: ...

    def take(self) -> list[EngineOutput]: ...

    def decide(self) -> None: ...

    def wait(self, timeout: float) -> None: ...

    def wake(self) -> None: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


EngineFactory = Callable[[EngineConfig, Callable[[LoadProgress], None]], CellEngine]
Inbox = SimpleQueue[messages.Command]


def main(build: EngineFactory, arguments: Sequence[str] | None = None) -> int:
    """Run a cell whose engine ``build`` makes, until it is told to shut down. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m crosspool.server.cell")
    parser.add_argument("--socket", required=True, help="path of the two pipes, without their endings")
    parser.add_argument("--parent", required=True, type=int, help="process id of the API process")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, args=(options.parent, options.socket), daemon=True).start()
    try:
        channel = CellChannel(options.socket)
    except FileNotFoundError:  # Its parent has gone meanwhile.
        remove_pipes(options.socket)
        return 1
    try:
        _build_and_serve(channel, build)
    except Exception as error:
        if not isinstance(error, CrossPoolError):
            logger.exception("the engine broke down")
        channel.send(messages.fail(error))
        return 1
    finally:
        channel.close()
    return 0


def _build_and_serve(channel: CellChannel, build: EngineFactory) -> None:
    start = channel.receive()
    if not isinstance(start, messages.Start):
        raise TypeError(f"the first message to a cell must be Start, not {type(start).__name__}")
    engine = build(start.config, lambda progress: channel.send(messages.Progress(progress)))
    try:
        inbox: Inbox = SimpleQueue()
        threading.Thread(target=_receive, args=(channel, inbox, engine.wake), daemon=True).start()
        engine.stream_to(channel.tokens)
        # What is there by now stays: the collector need not go through torch and all weights' tensors again.
        gc.freeze()
        channel.send(messages.Ready(engine.info))
        _serve(engine, inbox, channel.send)
    finally:
        engine.close()


def _serve(engine: CellEngine, inbox: Inbox, send: Callable[[messages.Event], None]) -> None:
    """The engine's loop: commands in, outputs out, decisions, and sleep when there is nothing to do.

    Outputs leave before anything new is submitted: a team may send that one's tokens by itself.
    """
    while True:
        while not inbox.empty():
            command = inbox.get()
            if isinstance(command, messages.Shutdown):
                return
            _obey(command, engine, send)
        outputs = engine.take()
        if outputs:
            send(messages.Outputs(tuple(outputs)))
        engine.decide()
        if inbox.empty():
            engine.wait(IDLE_WAIT)


def _obey(command: messages.Command, engine: CellEngine, send: Callable[[messages.Event], None]) -> None:
    match command:
        case messages.Submit(request):
            try:
                engine.add(request)
            except messages.REJECTIONS as error:
                send(messages.reject(request.id, error))
        case messages.Finish(request, at_token):
            engine.finish(request, at_token)
        case messages.Abort(request):
            engine.abort(request)
        case messages.StatsQuery(query):
            send(messages.Stats(query, engine.stats()))
        case _:
            raise TypeError(f"a running cell takes no {type(command).__name__}")


def _receive(channel: CellChannel, inbox: Inbox, wake: Callable[[], None]) -> None:
    with suppress(EOFError):
        while True:
            inbox.put(channel.receive())
            wake()


def _watch_parent(parent: int, path: str) -> None:
    """End the process, whatever it is doing, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL)
    remove_pipes(path)
    os._exit(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main(start_engine))
