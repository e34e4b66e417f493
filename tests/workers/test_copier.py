"""The copying thread: every byte arrives, in both directions, and it can be stopped between two pages."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import CopyId, HostPage, PageId, RequestId
from crosspool.workers import copier as module
from crosspool.workers.copier import HostCopier

pytestmark = pytest.mark.backend

PAGES, HOST_PAGES, PAGE_BYTES = 50, 40, 4096
PATIENCE = 60.0


class Rig:
    """A copier and its two arenas of random bytes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = lambda pages: (0, 256, (pages, PAGE_BYTES))  # noqa: E731
        self.arena = torch.randint(*shape(PAGES), dtype=torch.uint8, generator=generator)
        self.host = torch.randint(*shape(HOST_PAGES), dtype=torch.uint8, generator=generator)
        self.news = threading.Event()
        self.copier = HostCopier(self.arena, self.host)
        self.copier.start(self.news.set)
        self.copies = 0

    def copy(self, direction: Direction, pages: list[int], host_pages: list[int]) -> PageCopy:
        copy = PageCopy(
            CopyId(self.copies),
            RequestId(self.copies),
            direction,
            tuple(map(PageId, pages)),
            tuple(map(HostPage, host_pages)),
            len(pages) * PAGE_BYTES,
        )
        self.copies += 1
        self.copier.copy(copy)
        return copy

    def take(self, count: int) -> list[CopiedEvent]:
        """The next so many events."""
        events, limit = self.copier.take(), time.monotonic() + PATIENCE
        while len(events) < count:
            assert time.monotonic() < limit, f"{len(events)} of {count} copies were over in time"
            self.news.wait(1.0)
            self.news.clear()
            events += self.copier.take()
        return events


@pytest.fixture
def rig():
    before = set(threading.enumerate())
    it = Rig()
    yield it
    it.copier.close()
    assert set(threading.enumerate()) <= before


def test_pages_go_where_they_belong_and_nothing_else_is_touched(rig) -> None:
    rng = random.Random(0)
    arena, host = rig.arena.clone(), rig.host.clone()
    for _ in range(100):
        count = rng.randint(1, 12)
        pages, host_pages = rng.sample(range(PAGES), count), rng.sample(range(HOST_PAGES), count)
        direction = rng.choice(list(Direction))
        rig.copy(direction, pages, host_pages)
        if direction is Direction.OUT:
            host[host_pages] = arena[pages]
        else:
            arena[pages] = host[host_pages]
    events = rig.take(100)
    assert [event.copy for event in events] == list(range(100))
    assert all(event.time > 0 for event in events)
    assert torch.equal(rig.arena, arena) and torch.equal(rig.host, host)


class Gate:
    """Lets one page after another be copied."""

    def __init__(self, monkeypatch) -> None:
        self.copied, self.at, self.open = 0, threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(module.np, "copyto", self._copyto)
        self._original = np.copyto

    def _copyto(self, target, source) -> None:
        self.at.release()
        assert self.open.acquire(timeout=PATIENCE)
        target[:] = source
        self.copied += 1


def test_who_is_cancelled_is_copied_no_further_and_the_next_follows(rig, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    long = rig.copy(Direction.OUT, list(range(20)), list(range(20)))
    rig.copy(Direction.OUT, [30], [30])
    assert gate.at.acquire(timeout=PATIENCE)
    rig.copier.cancel(long.request)
    rig.copier.cancel(RequestId(99))
    gate.open.release(2)
    dropped, whole = rig.take(2)
    assert (dropped.copy, dropped.time) == (0, 0) and whole.time > 0
    assert gate.copied == 2
    assert torch.equal(rig.host[30], rig.arena[30])


def test_the_caller_does_not_wait_for_a_copy(rig, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    rig.copy(Direction.OUT, [1, 2], [1, 2])
    rig.copy(Direction.IN, [3], [3])
    assert gate.at.acquire(timeout=PATIENCE)
    assert rig.copier.take() == [] and gate.copied == 0
    gate.open.release(3)
    assert len(rig.take(2)) == 2


def test_it_closes_in_the_middle_of_a_copy(monkeypatch) -> None:
    gate, it = Gate(monkeypatch), Rig()
    it.copy(Direction.OUT, list(range(20)), list(range(20)))
    assert gate.at.acquire(timeout=PATIENCE)
    closing = threading.Thread(target=it.copier.close)
    closing.start()
    while not it.copier._closed:
        time.sleep(0)
    gate.open.release(1)
    closing.join(PATIENCE)
    assert not closing.is_alive() and gate.copied == 1


def test_a_thread_that_dies_of_a_bug_is_noticed(rig) -> None:
    rig.copy(Direction.OUT, [PAGES], [0])
    assert rig.news.wait(PATIENCE)
    with pytest.raises(InvariantError, match="copying thread has died"):
        rig.copier.take()


def test_pages_of_different_sizes_are_refused() -> None:
    with pytest.raises(InvariantError, match="pages of 4096 bytes, host pages of 8192"):
        HostCopier(torch.zeros(2, 4096, dtype=torch.uint8), torch.zeros(2, 8192, dtype=torch.uint8))
