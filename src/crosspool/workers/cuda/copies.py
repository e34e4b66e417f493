"""Copies between the pages of KV devices and the spill store: asynchronous, in a stream of each device beside
those of its lanes.

Streams of copies and of lanes need not wait for each other. A grant is over for the host when its lane has
told so, after the last of its passes that touch pages; those that are queued still compute nothing (flight.py
``ended``). So what a copy reads has been written before the host could put it into a stream. And a grant
whose pages a copy has written is submitted when the host has seen the event behind that copy.

Without threads and locks, as feeder.py: who has one calls ``step``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from crosspool.backends.device import Device, Event
from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import DeviceError, InvariantError, OutOfMemoryError
from crosspool.core.ids import HostPage, KvDevice, Nanoseconds, RequestId
from crosspool.workers.cuda.feeder import FAILED

_log = logging.getLogger(__name__)

PIECE = 8
"""Pages that are put into a stream together. At about 10 us each they keep the thread that feeds the lanes
too for less than 0.1 ms; pages are 0.5 to 2.4 MB (core/kv_layout.py ``choose_page_bytes``), so that over
PCIe 5, at about 50 GB/s, a piece takes 0.1 to 0.4 ms. Copies of that size gain little from being joined."""

AHEAD = 2
"""Pieces that a stream has before the host waits for the first of them to have run. What is cancelled is
copied no further, and a grant's words on their way to the device wait for no more than these."""

CHUNK_BYTES = 1 << 30
"""Of pinned memory at once. PyTorch rounds that up to a power of two: of these, less than a page is lost."""


class HostPages:
    """The spill store: ``total`` host pages in pinned memory, which is taken at once."""

    def __init__(self, device: Device, total: int, page_bytes: int) -> None:
        """Raises OutOfMemoryError."""
        self.total = total
        self._per_chunk = max(1, CHUNK_BYTES // page_bytes)
        self._chunks: list[Tensor] = []
        for first in range(0, total, self._per_chunk):
            shape = (min(self._per_chunk, total - first), page_bytes)
            try:
                self._chunks.append(device.pinned(shape, torch.uint8))
            except OutOfMemoryError as error:
                what = f"a spill store of {total:,} pages in pinned host memory"
                free = first * page_bytes + error.free
                raise OutOfMemoryError(what, needed=total * page_bytes, free=free) from error

    def __getitem__(self, page: HostPage) -> Tensor:
        """uint8 [page_bytes]."""
        chunk, place = divmod(page, self._per_chunk)
        return self._chunks[chunk][place]


@dataclass(eq=False, slots=True)
class _Flight:
    """One copy in flight. ``left`` of its parts are not over yet. ``error``: why it fails. ``time`` is that
    of the part that took longest."""

    copy: PageCopy
    left: int = 0
    dropped: bool = False
    error: str | None = None
    time: int = 0

    @property
    def event(self) -> CopiedEvent:
        whole = not self.dropped and self.error is None
        return CopiedEvent(self.copy.id, Nanoseconds(max(1, self.time) if whole else 0), self.error)


@dataclass(eq=False, slots=True)
class _Part:
    """What of a copy is on one device: ``moves`` are its pages there, from 0, and their host pages. ``put``
    of them are in the stream, the last of these in ``queued`` pieces that may not have run yet."""

    flight: _Flight
    moves: list[tuple[int, HostPage]] = field(default_factory=list)
    put: int = 0
    queued: int = 0
    begin: Event | None = None

    @property
    def goes_on(self) -> bool:
        """Whether more of it is to be put into the stream."""
        return self.put < len(self.moves) and not self.flight.dropped and self.flight.error is None

    @property
    def over(self) -> bool:
        """Whether it will touch no page any more."""
        return self.queued == 0 and not self.goes_on


class _Piece(NamedTuple):
    part: _Part
    end: Event


class _Side:
    """One KV device: its pages (``arena`` uint8 [pages, page_bytes]) and a stream, in which parts follow each
    other."""

    def __init__(self, device: Device, arena: Tensor, host: HostPages) -> None:
        self._device = device
        self._arena = arena
        self._host = host
        self._stream = device.stream(urgent=False)
        self._parts: list[_Part] = []
        self._pieces: deque[_Piece] = deque()

    def add(self, part: _Part) -> None:
        self._parts.append(part)

    def step(self) -> bool:
        """Take what has been copied, and put in what comes next. Returns whether there was anything to do."""
        try:
            taken = self._take()
            return self._feed() or taken
        except DeviceError as error:
            self._fail(error)
            return True

    def _take(self) -> bool:
        taken = False
        while self._pieces and self._pieces[0].end.done():
            part, end = self._pieces.popleft()
            assert part.begin is not None
            part.queued -= 1
            part.flight.time = max(part.flight.time, end.since(part.begin))
            taken = True
        for part in [part for part in self._parts if part.over]:
            self._parts.remove(part)
            part.flight.left -= 1
            taken = True
        return taken

    def _feed(self) -> bool:
        """One piece at most: lanes wait meanwhile."""
        part = next((part for part in self._parts if part.goes_on), None)
        if part is None or len(self._pieces) == AHEAD:
            return False
        if part.begin is None:
            part.begin = self._device.record(self._stream)
        try:
            self._put(part)
        except DeviceError:
            raise
        except Exception:
            _log.exception("pages of request %d could not be copied", part.flight.copy.request)
            part.flight.error = FAILED
        part.queued += 1
        self._pieces.append(_Piece(part, self._device.record(self._stream)))
        return True

    def _put(self, part: _Part) -> None:
        """Its next pages. If that fails, what is in the stream already still counts."""
        inwards = part.flight.copy.direction is Direction.IN
        for page, host_page in part.moves[part.put : part.put + PIECE]:
            own, spilled = self._arena[page], self._host[host_page]
            target, source = (own, spilled) if inwards else (spilled, own)
            self._device.copy(self._stream, target, source)
        part.put = min(part.put + PIECE, len(part.moves))

    def _fail(self, error: DeviceError) -> None:
        """What was to be copied is lost. So is what comes: a device that has failed says so whenever it is
        asked for something."""
        _log.error("pages of %s are copied no more: %s", self._device.name, error)
        self._pieces.clear()
        for part in self._parts:
            part.queued = 0
            part.flight.error = FAILED


class PageCopier:
    """Copies between the ``arenas`` of all KV devices, which hold the pages that ``places`` says, and the
    ``host`` pages. Copies follow each other on each device; one with pages on several is over with its last
    part. A device that fails ends the copies that have pages there with an error."""

    def __init__(
        self, places: DevicePages, devices: Sequence[Device], arenas: Sequence[Tensor], host: HostPages
    ) -> None:
        self._places = places
        self._host = host
        self._sides = [_Side(device, arena, host) for device, arena in zip(devices, arenas, strict=True)]
        self._flights: dict[RequestId, _Flight] = {}
        self._events: list[CopiedEvent] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._flights

    @property
    def told(self) -> bool:
        """Whether ``take`` has something to return."""
        return bool(self._events)

    def copy(self, copy: PageCopy) -> None:
        """Raises InvariantError if there are no such host pages."""
        if any(page >= self._host.total for page in copy.host_pages):
            raise InvariantError(
                f"copy {copy.id} of request {copy.request} is about host page {max(copy.host_pages)}; "
                f"the spill store has {self._host.total}"
            )
        flight = self._flights[copy.request] = _Flight(copy)
        parts: dict[KvDevice, _Part] = {}
        for page, host_page in zip(copy.pages, copy.host_pages, strict=True):
            device = self._places.device_of(page)
            part = parts.setdefault(device, _Part(flight))
            part.moves.append((page - self._places.starts[device], host_page))
        flight.left = len(parts)
        for device, part in parts.items():
            self._sides[device].add(part)

    def cancel(self, request: RequestId) -> None:
        """Drop what is left of the request's copy, if one is in flight."""
        if request in self._flights:
            self._flights[request].dropped = True

    def take(self) -> list[CopiedEvent]:
        """Copies that are over since the last call."""
        events, self._events = self._events, []
        return events

    def step(self) -> bool:
        """Take what has been copied, and put in what comes next. Returns whether there was anything to do."""
        busy = False
        for side in self._sides:
            busy |= side.step()
        for request, flight in list(self._flights.items()):
            if flight.left == 0:
                del self._flights[request]
                self._events.append(flight.event)
                busy = True
        return busy
