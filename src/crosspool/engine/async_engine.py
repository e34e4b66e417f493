"""An engine in this process with a stream per request: the step loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable

from crosspool.core.errors import CrossPoolError, EngineDeadError, InvariantError
from crosspool.core.ids import RequestId
from crosspool.core.info import EngineInfo, EngineStats
from crosspool.core.request import EngineOutput, Request
from crosspool.engine.engine import Engine

_log = logging.getLogger(__name__)

IDLE_WAIT_SECONDS = 60.0

Stream = asyncio.Queue[EngineOutput | CrossPoolError]


class AsyncEngine:
    """An EngineClient over an Engine. Created and used in one event loop; owns and closes the engine.

    The loop's thread passes commands to the engine thread through a queue, and the engine thread passes
    outputs back with ``call_soon_threadsafe``: the engine itself is only ever touched by its own thread.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[RequestId, Stream] = {}
        self._answers: set[asyncio.Future[EngineStats]] = set()
        self._stop = False
        self._death: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    async def generate(self, request: Request) -> AsyncIterator[EngineOutput]:
        """See EngineClient.generate."""
        self._raise_if_dead()
        if request.id in self._streams:
            raise InvariantError(f"request id {request.id} is in use")
        stream: Stream = asyncio.Queue()
        self._streams[request.id] = stream
        self._call(lambda: self._add(request))
        ended = False
        try:
            while not ended:
                output = await stream.get()
                if isinstance(output, CrossPoolError):
                    ended = True
                    raise output
                ended = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request.id]
            if not ended:
                self.abort(request.id)

    def finish(self, request: RequestId, at_token: int) -> None:
        """See EngineClient.finish."""
        self._call(lambda: self._engine.finish(request, at_token))

    def abort(self, request: RequestId) -> None:
        """See EngineClient.abort."""
        self._call(lambda: self._engine.abort(request))

    async def stats(self) -> EngineStats:
        """See EngineClient.stats."""
        self._raise_if_dead()
        answer: asyncio.Future[EngineStats] = self._loop.create_future()
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

        def take() -> None:
            self._tell(_answer, answer, self._engine.stats())

        self._call(take)
        return await answer

    async def close(self) -> None:
        """Stop the engine; open streams end with EngineDeadError."""

        def stop() -> None:
            self._stop = True

        self._call(stop)
        await asyncio.to_thread(self._thread.join)

    def _call(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._engine.wake()

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    # -- the engine's thread --------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            while not self._stop:
                self._take_commands()
                self._deliver(self._engine.step())
                if not self._stop and self._commands.empty():
                    self._engine.wait(IDLE_WAIT_SECONDS)
        except Exception:
            _log.exception("the engine's step failed")
            reason = "the engine failed"
        finally:
            self._engine.close()
            self._tell(self._die, reason)

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except CrossPoolError as error:
            self._tell(self._put, request.id, error)

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        if outputs:
            self._tell(self._put_all, outputs)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        """Run something in the event loop. If the loop is gone, nobody listens any more: stop."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            self._stop = True

    # -- the event loop -------------------------------------------------------------------------------

    def _put_all(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            self._put(output.request, output)

    def _put(self, request: RequestId, item: EngineOutput | CrossPoolError) -> None:
        stream = self._streams.get(request)
        if stream is not None:
            stream.put_nowait(item)

    def _die(self, reason: str) -> None:
        self._death = reason
        for stream in self._streams.values():
            stream.put_nowait(EngineDeadError(reason))
        for answer in list(self._answers):
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))


def _answer(future: asyncio.Future[EngineStats], stats: EngineStats) -> None:
    if not future.done():
        future.set_result(stats)
