"""Sequences that are copied to the spill store and back between their grants, over devices whose streams run
in any order: everybody says what they say alone, and pages are others' as soon as they have been copied."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.ids import CopyId, HostPage, RequestId
from crosspool.workers.cuda import copies
from crosspool.workers.cuda.copies import HostPages, PageCopier
from crosspool.workers.cuda.feeder import FAILED
from crosspool.workers.cuda.flight import Flight
from helpers_fake_life import PAGE_BYTES, Life, Sequence

pytestmark = pytest.mark.backend

HOST_PAGES = 60
SEEDS = 60


class SpillingLife(Life):
    """A random scheduler that also copies idle sequences out, and back into other pages. Who is copied, or in
    the store, is busy."""

    def __init__(self, seed: int, placement: str) -> None:
        super().__init__(seed, placement)
        store = HostPages(self.devices[0], HOST_PAGES, PAGE_BYTES)
        arenas = [own.arena for own in self.kv.values()]
        self.copier = PageCopier(self.places, self.devices[: len(arenas)], arenas, store)
        self.free_host = [HostPage(page) for page in range(HOST_PAGES)]
        self.host_pages: dict[RequestId, list[HostPage]] = {}
        self.copying: dict[CopyId, tuple[Sequence, Direction]] = {}
        self.stored: list[Sequence] = []
        self.copied: list[CopiedEvent] = []
        self.returned = self.ids = 0

    def _spill(self) -> None:
        idle = [s for s in self.sequences.values() if not s.busy and not s.cancelled and s.computed]
        if not idle or len(self.free_host) < len((own := self.rng.choice(idle)).pages):
            return
        self.rng.shuffle(self.free_host)
        count = len(own.pages)
        self.host_pages[own.id], self.free_host = self.free_host[:count], self.free_host[count:]
        own.busy = True
        self._copy(own, Direction.OUT)

    def _bring_back(self) -> None:
        if not self.stored:
            return
        own = self.rng.choice(self.stored)
        count = len(self.host_pages[own.id])
        if count <= len(self.free):
            self.stored.remove(own)
            self.rng.shuffle(self.free)
            own.pages, self.free = self.free[:count], self.free[count:]
            self._copy(own, Direction.IN)

    def _copy(self, own: Sequence, direction: Direction) -> None:
        copy = CopyId(self.ids)
        self.ids += 1
        self.copying[copy] = own, direction
        pages, host_pages = tuple(own.pages), tuple(self.host_pages[own.id])
        self.copier.copy(PageCopy(copy, own.id, direction, pages, host_pages, PAGE_BYTES * len(pages)))

    def _disturb(self) -> None:
        super()._disturb()
        for own in list(self.sequences.values()):
            if own.cancelled:
                self.copier.cancel(own.id)
                if own in self.stored:
                    self.stored.remove(own)
                    self._end(own)

    def _end(self, sequence: Sequence) -> None:
        super()._end(sequence)
        self.free_host += self.host_pages.pop(sequence.id, [])

    def _take(self) -> None:
        super()._take()
        for event in self.copier.take():
            self.copied.append(event)
            own, direction = self.copying.pop(event.copy)
            if own.cancelled or event.error is not None:
                self._end(own)
            elif direction is Direction.OUT:
                self._give_pages_back(own)
                self.stored.append(own)
            else:
                self.free_host += self.host_pages.pop(own.id)
                self.returned += 1
                own.busy = False

    def live(self, steps: int) -> None:
        for _ in range(steps):
            super().live(1)
            draw = self.rng.random()
            if draw < 0.05:
                self._spill()
            elif draw < 0.12:
                self._bring_back()
            elif draw < 0.3:
                self.copier.step()
                self._take()

    def finish(self) -> None:
        still = 0
        while self.sequences:
            self._bring_back()
            self._submit()
            moved = self.copier.step() | self.feeder.step() | self.world.step()
            self._take()
            still = 0 if moved else still + 1
            assert still < 50, "nothing moves"
        super().finish()
        assert self.copier.idle and len(self.free_host) == HOST_PAGES
        assert sorted(event.copy for event in self.copied) == list(range(self.ids))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PIECE", 2)


@pytest.mark.parametrize("placement", ["one device", "one device, loops", "two devices", "two KV devices"])
def test_who_was_spilled_says_what_they_say_alone(placement: str) -> None:
    returned = 0
    for seed in range(SEEDS):
        life = SpillingLife(seed, placement)
        life.live(400)
        life.finish()
        assert set(life.errors) == {None} and all(event.error is None for event in life.copied)
        returned += life.returned
    assert returned > SEEDS // 4


def test_a_lost_device_ends_grants_and_copies(caplog: pytest.LogCaptureFixture) -> None:
    ended = 0
    for seed in range(100):
        life = SpillingLife(seed, "one device")
        life.live(300)
        life.world.lost.add("a")
        life.world.streams = []
        with caplog.at_level(logging.CRITICAL):
            life.live(50)
            for _ in range(3):
                life.copier.step()
                life.feeder.step()
                life._take()
        assert life.copier.idle and life.feeder.idle
        assert {event.error for event in life.copied} <= {None, FAILED}
        ended += sum(event.error == FAILED for event in life.copied)
    assert ended > 50


# -- what must not be left out -----------------------------------------------------------------------------


def copied_when_put(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(copies._Part, "over", property(lambda self: not self.goes_on))


def without_the_last_piece(patch: pytest.MonkeyPatch) -> None:
    goes_on = copies._Part.goes_on.fget
    patch.setattr(
        copies._Part,
        "goes_on",
        property(lambda self: goes_on(self) and self.put + copies.PIECE < len(self.moves)),
    )


def idle_when_all_is_put(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flight, "ended", property(lambda self: not self.goes_on))


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a copy is over when all of it is put": copied_when_put,
    "the last piece is left out": without_the_last_piece,
    "a grant is over when all of it is put": idle_when_all_is_put,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_it_is_seen_if(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises((AssertionError, KeyError, ValueError, IndexError)):
        for seed in range(60):
            life = SpillingLife(seed, "one device")
            life.live(400)
            life.finish()
