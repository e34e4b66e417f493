"""The account of the spill store, and page tables that are laid out anew for what is in it."""

from __future__ import annotations

import random

import pytest

from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import NULL_PAGE, HostPage, KvDevice, ModelIndex
from crosspool.core.kv_layout import make_layout
from crosspool.pools.kv import KvPool
from crosspool.pools.quotas import Quota
from crosspool.pools.spill import SpilledPages, SpillStore
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

MODEL, HOME = ModelIndex(0), KvDevice(0)


def test_it_gives_all_or_nothing_and_takes_back() -> None:
    store = SpillStore(7)
    first = store.take(40, (0, 1), (3, 2))
    assert first is not None and store.used == 5
    assert [len(group) for group in first.groups] == [3, 2]
    assert store.take(40, (0, 0), (2, 1)) is None and store.used == 5
    second = store.take(10, (0, 0), (1, 1))
    assert second is not None
    store.check([first, second])
    assert sorted([*first.pages, *second.pages]) == list(range(7))
    store.give_back(first)
    store.check([second])
    with pytest.raises(InvariantError, match="7 host pages, but sequences have 7"):
        store.check([first, second])


def test_memory_that_was_written_is_used_before_other() -> None:
    store = SpillStore(1000)
    for _ in range(50):
        spilled = store.take(1, (0,), (6,))
        assert spilled is not None and max(spilled.pages) < 6
        store.give_back(spilled)


def test_pages_from_a_chunk_on() -> None:
    pages = [HostPage(i) for i in range(7)]
    spilled = SpilledPages(60, (0, 2), (tuple(pages[:4]), tuple(pages[4:])))
    assert spilled.since(0) == [tuple(pages[:4]), tuple(pages[4:])]
    assert spilled.since(3) == [(3,), (5, 6)]


@pytest.mark.parametrize("seed", range(200))
def test_a_table_is_laid_out_anew_as_it_was(seed: int) -> None:
    """With window groups and over two devices; afterwards it grows and is trimmed like any other."""
    rng = random.Random(seed)
    spec = gqa_spec(windows=tuple(rng.choice((None, 20, 33, 64)) for _ in range(rng.randint(1, 4))))
    layout = make_layout(spec, 16 * spec.kv_bytes_per_token_layer)
    pool = KvPool({MODEL: layout}, DevicePages.of([rng.randint(20, 40), 60]), step_tokens=16)
    table = pool.open(MODEL, HOME)
    tokens = rng.randint(1, 150)
    for computed in range(tokens + 1):
        assert pool.grow(table, min(tokens, computed + 16))
        pool.trim(table, computed)
    held = [[page != NULL_PAGE for page in group[: layout.chunks(tokens)]] for group in table.groups]
    kept_from, counts = tuple(table.kept_from), [len(pages) for pages in table.written(tokens)]
    assert counts == [sum(group) for group in held]
    pool.release(table)
    other = pool.open(MODEL, HOME)
    assert pool.restore(other, tokens, kept_from)
    assert [[page != NULL_PAGE for page in group] for group in other.groups] == held
    assert other.pages == sum(counts) and other.tokens >= tokens
    pool.check([other])
    for computed in range(tokens, tokens + 60):
        assert pool.grow(other, computed + 1)
        pool.trim(other, computed)
        pool.check([other])
    pool.release(other)
    pool.check([])
    assert pool.free == pool.total


def test_nothing_is_taken_where_pages_or_the_quota_do_not_suffice() -> None:
    spec = gqa_spec(layers=2)
    layout = make_layout(spec, 16 * spec.kv_bytes_per_token)
    places = DevicePages.of([10])
    pool = KvPool({MODEL: layout}, places, step_tokens=16, quotas={MODEL: Quota(cap=4)})
    table = pool.open(MODEL, HOME)
    assert not pool.restore(table, 65, (0,)) and table.pages == 0
    assert pool.restore(table, 64, (0,)) and table.pages == 4
    pool.check([table])


def test_what_other_tables_hold_too() -> None:
    spec = gqa_spec(layers=2)
    layout = make_layout(spec, 16 * spec.kv_bytes_per_token)
    pool = KvPool({MODEL: layout}, DevicePages.of([20]), step_tokens=16, prefix_secret=bytes(16))
    keys = [bytes([i] * 16) for i in range(5)]
    one, two = pool.open(MODEL, HOME), pool.open(MODEL, HOME)
    pool.grow(one, 80)
    pool.publish(one, keys)
    assert pool.chunks_of_others(one) == 0
    pool.share(two, keys[:3])
    assert pool.chunks_of_others(one) == pool.chunks_of_others(two) == 3
    pool.release(one)
    assert pool.chunks_of_others(two) == 0, "what only the cache keeps is nobody's"
    assert pool.restore(two, 80, (0,)) and two.chunks == 5 and two.pages == 5
    pool.check([two])
