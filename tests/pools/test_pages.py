"""Pages are given once, shared by count, and free again at once."""

from __future__ import annotations

import random

import pytest

from crosspool.core.errors import InvariantError
from crosspool.core.ids import KvDevice, PageId
from crosspool.pools.pages import PageAllocator

pytestmark = pytest.mark.unit

HOME = KvDevice(0)


def test_all_or_nothing() -> None:
    pages = PageAllocator(5)
    first = pages.allocate(3, HOME)
    assert first is not None and len(set(first)) == 3
    assert pages.allocate(3, HOME) is None and pages.free == 2
    assert pages.allocate(0, HOME) == []
    pages.release(first)
    assert pages.free == 5


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pages = PageAllocator(2)
    held = pages.allocate(1, HOME)
    assert held is not None
    pages.retain(held)
    pages.release(held)
    assert pages.free == 1
    pages.check(held)
    pages.release(held)
    assert pages.free == 2


def test_what_must_not_happen_is_an_error() -> None:
    pages = PageAllocator(3)
    held = pages.allocate(1, HOME)
    assert held is not None
    with pytest.raises(InvariantError, match="in 0 tables but has 1 references"):
        pages.check([])
    pages.release(held)
    with pytest.raises(InvariantError, match="released but nobody holds it"):
        pages.release(held)
    with pytest.raises(InvariantError, match="shared but nobody holds it"):
        pages.retain([PageId(1)])


def test_pages_of_each_device_are_free_on_it() -> None:
    pages = PageAllocator(3, 5, 2)
    held = pages.allocate(4, KvDevice(2))
    assert held is not None and sorted(held) == [3, 4, 8, 9], "two of its own, two of the emptiest other"
    assert [pages.free_on(device) for device in pages.places.devices] == [3, 3, 0]
    pages.release(held[:1] + held[-1:])
    assert [pages.free_on(device) for device in pages.places.devices] == [3, 4, 1]
    pages.check(held[1:-1])
    pages._free[0].append(pages._free[2].pop())
    with pytest.raises(InvariantError, match="KV device 0 has 3 pages, but 0 are in use and 4 are free"):
        pages.check(held[1:-1])


@pytest.mark.parametrize("counts", [(40,), (13, 20, 7)])
def test_random_use_keeps_the_account(counts: tuple[int, ...]) -> None:
    rng = random.Random(7)
    pages, tables = PageAllocator(*counts), []
    for _ in range(3000):
        action = rng.randrange(3)
        home = KvDevice(rng.randrange(len(counts)))
        if action == 0 and (got := pages.allocate(rng.randint(0, 9), home)) is not None:
            tables.append(got)
        elif action == 1 and tables:
            shared = list(rng.choice(tables))
            pages.retain(shared)
            tables.append(shared)
        elif action == 2 and tables:
            pages.release(tables.pop(rng.randrange(len(tables))))
        pages.check(page for table in tables for page in table)
