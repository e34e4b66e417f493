"""Copies between the pages of CPU devices and the spill store: both are memory of this process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from torch import Tensor

from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import Nanoseconds, RequestId

_log = logging.getLogger(__name__)

NICENESS = 5
"""Of the copying thread. On a core that a team wants too, it has about a quarter of the time (sched(7)): what
others decode goes on. An idle core is all its own."""


@dataclass(slots=True, eq=False)
class _Job:
    copy: PageCopy
    dropped: bool = False


class HostCopier:
    """One thread that copies page by page, one copy after another.

    ``arena`` is uint8 [pages, page_bytes] of all KV devices, ``host`` uint8 [host pages, page_bytes]. What
    others call, they call from the engine's thread. That thread does not wait for a page to be copied: numpy
    gives up the interpreter's lock meanwhile.
    """

    def __init__(self, arena: Tensor, host: Tensor) -> None:
        if arena.shape[1] != host.shape[1]:
            raise InvariantError(f"pages of {arena.shape[1]} bytes, host pages of {host.shape[1]}")
        self._arena = arena.numpy()
        self._host = host.numpy()
        self._jobs: dict[RequestId, _Job] = {}
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._done: deque[tuple[_Job, CopiedEvent]] = deque()
        self._closed = False
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, news: Callable[[], None]) -> None:
        """``news`` is called from the copying thread when ``take`` has something to return."""
        self._thread = threading.Thread(target=self._run, args=(news,), name="crosspool copier", daemon=True)
        self._thread.start()

    def copy(self, copy: PageCopy) -> None:
        job = self._jobs[copy.request] = _Job(copy)
        self._queue.put(job)

    def cancel(self, request: RequestId) -> None:
        """Drop what is left of the request's copy, if one is in flight."""
        if request in self._jobs:
            self._jobs[request].dropped = True

    def take(self) -> list[CopiedEvent]:
        """Copies that are over since the last call. Raises InvariantError if the thread has died of a bug."""
        if self._broken is not None:
            raise InvariantError("the copying thread has died") from self._broken
        events = []
        while self._done:
            job, event = self._done.popleft()
            del self._jobs[job.copy.request]
            events.append(event)
        return events

    def close(self) -> None:
        """End the thread. Copies in flight are dropped."""
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, news: Callable[[], None]) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            while (job := self._queue.get()) is not None and not self._closed:
                self._done.append((job, self._copy(job)))
                news()
        except Exception as error:
            _log.exception("the copying thread died")
            self._broken = error
            news()

    def _copy(self, job: _Job) -> CopiedEvent:
        copy, begin = job.copy, time.monotonic_ns()
        source, target = self._arena, self._host
        moves = zip(copy.pages, copy.host_pages, strict=True)
        if copy.direction is Direction.IN:
            source, target = target, source
            moves = zip(copy.host_pages, copy.pages, strict=True)  # type: ignore[arg-type]
        for origin, place in moves:
            if job.dropped or self._closed:
                return CopiedEvent(copy.id, Nanoseconds(0))
            np.copyto(target[place], source[origin])
        return CopiedEvent(copy.id, Nanoseconds(max(1, time.monotonic_ns() - begin)))
