"""The plain-data contract for copies between KV pages and host memory. That for grants is core/batch.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from crosspool.core.ids import CopyId, HostPage, Nanoseconds, PageId, RequestId


class Direction(IntEnum):
    """OUT: from KV pages to host memory. IN: back."""

    OUT = 0
    IN = 1


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Whole pages of one sequence, on any KV devices: ``pages[i]`` to ``host_pages[i]``, or the reverse.

    No micro-batch in flight has a row of the sequence. From submission until the CopiedEvent nobody else
    writes any of these, and nobody reads those that are being written. ``size`` is the bytes of all pages.
    """

    id: CopyId
    request: RequestId
    direction: Direction
    pages: tuple[PageId, ...]
    host_pages: tuple[HostPage, ...]
    size: int


class CopiedEvent(NamedTuple):
    """A copy is over: the executor does not touch its pages and host pages any more. All is copied, unless
    the request was cancelled, or ``error`` says why not. ``time`` is what the copy itself took, for
    calibration; 0 if it was dropped or failed."""

    copy: CopyId
    time: Nanoseconds
    error: str | None = None
