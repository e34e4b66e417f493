"""Pages are given once, shared by count, and free again at once."""

from __future__ import annotations

import random

import pytest

from crosspool.core.errors import InvariantError
from crosspool.core.ids import PageId
from crosspool.pools.pages import PageAllocator

pytestmark = pytest.mark.unit


def test_all_or_nothing() -> None:
    pages = PageAllocator(5)
    first = pages.allocate(3)
    assert first is not None and len(set(first)) == 3
    assert pages.allocate(3) is None and pages.free == 2
    assert pages.allocate(0) == []
    pages.release(first)
    assert pages.free == 5


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pages = PageAllocator(2)
    held = pages.allocate(1)
    assert held is not None
    pages.retain(held)
    pages.release(held)
    assert pages.free == 1
    pages.check(held)
    pages.release(held)
    assert pages.free == 2


def test_what_must_not_happen_is_an_error() -> None:
    pages = PageAllocator(3)
    held = pages.allocate(1)
    assert held is not None
    with pytest.raises(InvariantError, match="in 0 tables but has 1 references"):
        pages.check([])
    pages.release(held)
    with pytest.raises(InvariantError, match="released but nobody holds it"):
        pages.release(held)
    with pytest.raises(InvariantError, match="shared but nobody holds it"):
        pages.retain([PageId(1)])


def test_random_use_keeps_the_account() -> None:
    rng = random.Random(7)
    pages, tables = PageAllocator(40), []
    for _ in range(3000):
        action = rng.randrange(3)
        if action == 0 and (got := pages.allocate(rng.randint(0, 9))) is not None:
            tables.append(got)
        elif action == 1 and tables:
            shared = list(rng.choice(tables))
            pages.retain(shared)
            tables.append(shared)
        elif action == 2 and tables:
            pages.release(tables.pop(rng.randrange(len(tables))))
        pages.check(page for table in tables for page in table)
