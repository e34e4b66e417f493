"""Copies of pages over devices whose streams run in any order: every byte arrives, each copy is over once and
touches nothing afterwards, whatever is cancelled or fails. And what must not be left out, cannot be."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError, OutOfMemoryError
from crosspool.core.ids import CopyId, HostPage, PageId, RequestId
from crosspool.workers.cuda import copies
from crosspool.workers.cuda.copies import HostPages, PageCopier
from crosspool.workers.cuda.feeder import FAILED
from helpers_fake_devices import FakeDevice, FakeEvent, World

pytestmark = pytest.mark.backend

PAGE_BYTES, PAGES, HOST_PAGES = 16, 12, 30
NOBODYS = 255
SEEDS = 300


@dataclass
class Tenant:
    """Somebody with ``content`` in pages, in the store, or, while it is copied, in both."""

    id: RequestId
    content: torch.Tensor
    pages: list[PageId]
    host_pages: list[HostPage]
    copy: CopyId | None = None
    cancelled: bool = False


class Life:
    """Tenants come, move out of their pages and into others, and leave. Whatever is nobody's is NOBODYS."""

    def __init__(self, seed: int, devices: int) -> None:
        self.rng = random.Random(seed)
        self.world = World(self.rng)
        self.devices = [FakeDevice(f"cuda:{number}", self.world) for number in range(devices)]
        self.places = DevicePages.of([PAGES + number for number in range(devices)])
        self.arenas = [
            torch.full((len(self.places.pages_of(device)), PAGE_BYTES), NOBODYS, dtype=torch.uint8)
            for device in self.places.devices
        ]
        self.host = HostPages(self.devices[0], HOST_PAGES, PAGE_BYTES)
        for page in range(HOST_PAGES):
            self.host[HostPage(page)].fill_(NOBODYS)
        self.copier = PageCopier(self.places, self.devices, self.arenas, self.host)
        self.free = [PageId(page) for page in range(self.places.total)]
        self.free_host = [HostPage(page) for page in range(HOST_PAGES)]
        self.tenants: dict[RequestId, Tenant] = {}
        self.copying: dict[CopyId, tuple[Tenant, Direction]] = {}
        self.events: list[CopiedEvent] = []
        self.copies: list[PageCopy] = []
        self.arrived = 0

    def page(self, page: PageId) -> torch.Tensor:
        device = self.places.device_of(page)
        return self.arenas[device][page - self.places.starts[device]]

    def _take_pages(self, count: int) -> list[PageId]:
        self.rng.shuffle(self.free)
        pages, self.free = self.free[:count], self.free[count:]
        assert all(bool((self.page(page) == NOBODYS).all()) for page in pages), "a free page was written"
        return pages

    def _give_back_pages(self, tenant: Tenant) -> None:
        for page in tenant.pages:
            self.page(page).fill_(NOBODYS)
        self.free += tenant.pages
        tenant.pages = []

    def _give_back_host(self, tenant: Tenant) -> None:
        for page in tenant.host_pages:
            self.host[page].fill_(NOBODYS)
        self.free_host += tenant.host_pages
        tenant.host_pages = []

    def _arrive(self) -> None:
        count = self.rng.randrange(1, 9)
        if count > len(self.free):
            return
        content = torch.tensor(
            [[self.rng.randrange(NOBODYS) for _ in range(PAGE_BYTES)] for _ in range(count)]
        )
        self.arrived += 1
        new = Tenant(RequestId(self.arrived), content.byte(), self._take_pages(count), [])
        for page, own in zip(new.pages, new.content, strict=True):
            self.page(page).copy_(own)
        self.tenants[new.id] = new

    def _move(self) -> None:
        """Somebody is copied out, or comes back."""
        idle = [tenant for tenant in self.tenants.values() if tenant.copy is None]
        if not idle:
            return
        tenant = self.rng.choice(idle)
        count, direction = len(tenant.content), Direction.OUT if tenant.pages else Direction.IN
        if count > len(self.free_host if tenant.pages else self.free):
            return
        if direction is Direction.OUT:
            self.rng.shuffle(self.free_host)
            tenant.host_pages, self.free_host = self.free_host[:count], self.free_host[count:]
        else:
            tenant.pages = self._take_pages(count)
        tenant.copy = CopyId(len(self.copies))
        self.copying[tenant.copy] = tenant, direction
        pages, host_pages = tuple(tenant.pages), tuple(tenant.host_pages)
        new = PageCopy(tenant.copy, tenant.id, direction, pages, host_pages, PAGE_BYTES * count)
        self.copies.append(new)
        self.copier.copy(new)

    def _cancel(self) -> None:
        if self.tenants:
            tenant = self.rng.choice(list(self.tenants.values()))
            tenant.cancelled = True
            self.copier.cancel(tenant.id)
            if tenant.copy is None:
                self._leave(tenant)

    def _leave(self, tenant: Tenant) -> None:
        self._give_back_pages(tenant)
        self._give_back_host(tenant)
        del self.tenants[tenant.id]

    def _take(self) -> None:
        for event in self.copier.take():
            self.events.append(event)
            tenant, direction = self.copying.pop(event.copy)
            tenant.copy = None
            assert (event.time == 0) == (tenant.cancelled or event.error is not None)
            if tenant.cancelled or event.error is not None:
                self._leave(tenant)
                continue
            (self._give_back_pages if direction is Direction.OUT else self._give_back_host)(tenant)
            assert torch.equal(self._memory_of(tenant), tenant.content)

    def _memory_of(self, tenant: Tenant) -> torch.Tensor:
        """Of one that is nowhere else, what is there."""
        spilled = [self.host[page] for page in tenant.host_pages]
        return torch.stack(spilled or [self.page(page) for page in tenant.pages])

    def _look(self) -> None:
        """A stream has as much as it may have: whole pieces, each with an event, and one before the first."""
        most = copies.AHEAD * (copies.PIECE + 2)
        assert all(len(stream.work) <= most for stream in self.world.streams)

    def live(self, steps: int, *, cancels: bool = True) -> None:
        for _ in range(steps):
            draw = self.rng.random()
            if draw < 0.06:
                self._arrive()
            elif draw < 0.16:
                self._move()
            elif draw < 0.18 and cancels:
                self._cancel()
            elif draw < 0.45:
                self.copier.step()
                self._look()
                self._take()
            else:
                self.world.step()

    def finish(self) -> None:
        while self.copying:
            moved = self.copier.step() | self.world.step()
            self._take()
            assert moved, "nothing moves"
        assert self.copier.idle and not self.copier.told
        for tenant in list(self.tenants.values()):
            assert torch.equal(self._memory_of(tenant), tenant.content)
            self._leave(tenant)
        while self.world.step():
            pass
        assert len(self._take_pages(self.places.total)) == self.places.total
        assert all(bool((self.host[HostPage(page)] == NOBODYS).all()) for page in range(HOST_PAGES))
        assert sorted(event.copy for event in self.events) == list(range(len(self.copies)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are shorter than most copies, and the store is of several chunks."""
    monkeypatch.setattr(copies, "PIECE", 3)
    monkeypatch.setattr(copies, "CHUNK_BYTES", 7 * PAGE_BYTES)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_every_byte_arrives_and_every_copy_is_over_once(devices: int) -> None:
    copied = dropped = 0
    for seed in range(SEEDS):
        life = Life(seed, devices)
        life.live(300)
        life.finish()
        assert all(event.error is None for event in life.events)
        copied += sum(event.time > 0 for event in life.events)
        dropped += sum(event.time == 0 for event in life.events)
    assert copied > 5 * SEEDS and dropped > SEEDS / 4


def test_a_device_that_fails_ends_the_copies_that_have_pages_there(caplog) -> None:
    """Those that have none there go on, and those that come there end at once."""
    failed = whole = 0
    for seed in range(SEEDS):
        life = Life(seed, 3)
        life.live(200)
        lost, known = life.rng.choice(life.places.devices), len(life.copies)
        own = set(life.places.pages_of(lost))
        life.world.lost.add(life.devices[lost].name)
        life.world.streams = [s for s in life.world.streams if s.device not in life.world.lost]
        before = len(life.events)
        with caplog.at_level(logging.CRITICAL):
            life.live(200)
            life.finish()
        for event in life.events[before:]:
            there = not own.isdisjoint(life.copies[event.copy].pages)
            assert there or event.error is None
            if there and event.copy >= known:
                assert event.time == 0, "it cannot have been copied"
                failed += event.error == FAILED
            whole += event.time > 0
    assert failed > SEEDS and whole > SEEDS


def test_what_cannot_be_put_into_a_stream_fails_alone(monkeypatch, caplog) -> None:
    failed = 0
    copy = FakeDevice.copy
    for seed in range(100):
        life, rng = Life(seed, 2), random.Random(seed)

        def failing(self, stream, target, source, rng=rng) -> None:
            if rng.random() < 0.02:
                raise RuntimeError("secret detail")
            copy(self, stream, target, source)

        monkeypatch.setattr(FakeDevice, "copy", failing)
        with caplog.at_level(logging.CRITICAL):
            life.live(300)
            life.finish()
        failed += sum(event.error == FAILED for event in life.events)
    assert failed > 50


def test_a_long_copy_is_dropped_within_two_pieces() -> None:
    life = Life(0, 1)
    request, count = RequestId(7), PAGES
    pages, host_pages = tuple(life.free), tuple(life.free_host[:count])
    for page in pages:
        life.page(page).fill_(1)
    life.copier.copy(PageCopy(CopyId(0), request, Direction.OUT, pages, host_pages, 0))
    for _ in range(5):
        life.copier.step()
    life.copier.cancel(request)
    life.copier.cancel(RequestId(8))
    assert life.copier.take() == []
    while life.world.step() or not life.copier.told:
        life.copier.step()
    assert life.copier.take() == [CopiedEvent(CopyId(0), 0)]
    written = [bool((life.host[page] == 1).all()) for page in host_pages]
    assert sum(written) == copies.AHEAD * copies.PIECE < count


def test_host_pages_that_there_are_not_are_refused() -> None:
    life = Life(0, 1)
    copy = PageCopy(CopyId(3), RequestId(5), Direction.OUT, (PageId(0),), (HostPage(HOST_PAGES),), 0)
    with pytest.raises(InvariantError, match=r"copy 3 of request 5 is about host page 30; .* has 30"):
        life.copier.copy(copy)
    assert life.copier.idle


def test_a_store_that_cannot_be_pinned_says_how_large_it_was_to_be(monkeypatch) -> None:
    taken: list[int] = []

    def pinned(self, shape, dtype):
        size = torch.Size(shape).numel()
        if sum(taken) + size > 20 * PAGE_BYTES:
            raise OutOfMemoryError("pinned", needed=size, free=20 * PAGE_BYTES - sum(taken))
        taken.append(size)
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(FakeDevice, "pinned", pinned)
    device = FakeDevice("cuda:0", World(random.Random(0)))
    with pytest.raises(OutOfMemoryError, match="a spill store of 25 pages in pinned host memory") as error:
        HostPages(device, 25, PAGE_BYTES)
    assert (error.value.needed, error.value.free) == (25 * PAGE_BYTES, 20 * PAGE_BYTES)
    assert all(size <= copies.CHUNK_BYTES for size in taken) and len(taken) == 2


# -- what must not be left out -----------------------------------------------------------------------------


def without_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeEvent, "done", lambda self: True)
    patch.setattr(FakeEvent, "since", lambda self, earlier: 1000)


def over_when_cancelled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copies._Part, "over", property(lambda self: not self.goes_on))


def over_with_the_first_part(patch: pytest.MonkeyPatch) -> None:
    copy = PageCopier.copy

    def early(self: PageCopier, each: PageCopy) -> None:
        copy(self, each)
        self._flights[each.request].left = 1

    patch.setattr(PageCopier, "copy", early)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "events are not waited for": without_waiting,
    "what is cancelled is over while it is in a stream": over_when_cancelled,
    "a copy is over with its first part": over_with_the_first_part,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_it_is_seen_if(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(100):
            life = Life(seed, 2)
            life.live(300)
            life.finish()
