"""An EngineClient whose engine lives in a cell, and survives the cell's death as an object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import count

from crosspool.core.errors import CrossPoolError, EngineDeadError
from crosspool.core.ids import RequestId
from crosspool.core.info import EngineInfo, EngineStats
from crosspool.core.request import EngineOutput, Request
from crosspool.llm.arrivals import Arrivals
from crosspool.server import messages
from crosspool.server.channel import ApiChannel


class RemoteEngine:
    """Routes requests to the cell of the moment and its events back.

    The supervisor attaches a channel when a cell is ready and detaches it when the cell is gone; in between
    it delivers the cell's events. Everything runs on one event loop.
    """

    def __init__(self) -> None:
        self._channel: ApiChannel | None = None
        self._info: EngineInfo | None = None
        self._streams: dict[RequestId, Arrivals[EngineOutput | CrossPoolError]] = {}
        self._queries: dict[int, asyncio.Future[EngineStats]] = {}
        self._query_numbers = count()

    @property
    def info(self) -> EngineInfo:
        """The engine as it was last ready. Raises EngineDeadError if it never was."""
        if self._info is None:
            raise EngineDeadError("the engine is still loading its models")
        return self._info

    async def generate(self, request: Request) -> AsyncIterator[EngineOutput]:
        """See EngineClient.generate."""
        self._send(messages.Submit(request))
        stream = self._streams[request.id] = Arrivals()
        open_in_engine = True
        try:
            while open_in_engine:
                for item in await stream.take():
                    if isinstance(item, CrossPoolError):
                        open_in_engine = False
                        raise item
                    open_in_engine = item.finish_reason is None
                    yield item
                    if not open_in_engine:
                        return
        finally:
            del self._streams[request.id]
            if open_in_engine:
                self.abort(request.id)

    def finish(self, request: RequestId, at_token: int) -> None:
        """See EngineClient.finish. Without a cell there is nothing to finish."""
        if self._channel is not None:
            self._channel.send(messages.Finish(request, at_token))

    def abort(self, request: RequestId) -> None:
        """See EngineClient.abort. Without a cell there is nothing to abort."""
        if self._channel is not None:
            self._channel.send(messages.Abort(request))

    async def stats(self) -> EngineStats:
        """Figures of this moment, from the engine's own loop. Raises EngineDeadError if it dies meanwhile."""
        query = next(self._query_numbers)
        self._send(messages.StatsQuery(query))
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._queries[query] = answer
        try:
            return await answer
        finally:
            del self._queries[query]

    async def close(self) -> None:
        """End all streams. The cell belongs to the supervisor, which ends it."""
        self.detach(EngineDeadError("the engine is closed"))

    def attach(self, channel: ApiChannel, info: EngineInfo) -> None:
        """A cell is ready behind ``channel``."""
        self._channel = channel
        self._info = info

    def detach(self, error: EngineDeadError) -> None:
        """The cell is gone: everything under way ends with ``error``."""
        self._channel = None
        for stream in self._streams.values():
            stream.put(error)
        for query in self._queries.values():
            if not query.done():
                query.set_exception(error)

    def deliver(self, event: messages.Outputs | messages.Rejected | messages.Stats) -> None:
        """Hand an event to whoever waits for it; what nobody waits for any more is dropped."""
        match event:
            case messages.Outputs(outputs):
                for output in outputs:
                    self._put(output.request, output)
            case messages.Rejected(request):
                self._put(request, messages.to_error(event))
            case messages.Stats(number, stats):
                query = self._queries.get(number)
                if query is not None and not query.done():
                    query.set_result(stats)

    def _put(self, request: RequestId, item: EngineOutput | CrossPoolError) -> None:
        stream = self._streams.get(request)
        if stream is not None:
            stream.put(item)

    def _send(self, command: messages.Command) -> None:
        if self._channel is None:
            raise EngineDeadError("the engine is not running")
        self._channel.send(command)
