"""Chunks are found by what they hold, shared by count, and given up last chunk first."""

from __future__ import annotations

import random

import pytest

from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import KvDevice, ModelIndex
from crosspool.core.kv_layout import make_layout
from crosspool.pools.kv import KvPool
from crosspool.pools.page_table import PageTable
from crosspool.pools.prefix_cache import next_key, root_key
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

PLAIN, LATENT, WINDOWED = ModelIndex(0), ModelIndex(1), ModelIndex(2)
DEVICE = KvDevice(0)
SECRET = b"s" * 32


def make_pool(
    pages: int,
    *,
    secret: bytes | None = SECRET,
    devices: int = 1,
    homes: dict[ModelIndex, KvDevice] | None = None,
) -> KvPool:
    specs = [gqa_spec(layers=4), mla_spec(layers=3), gqa_spec(windows=(None, 20, 20))]
    page_bytes = 32 * specs[0].kv_bytes_per_token_layer
    layouts = {ModelIndex(i): make_layout(spec, page_bytes) for i, spec in enumerate(specs)}
    places = DevicePages.of([pages] * devices)
    return KvPool(layouts, places, step_tokens=16, homes=homes, prefix_secret=secret)


def keys_of(pool: KvPool, model: ModelIndex, tokens: list[int], tenant: bytes = b"") -> list[bytes]:
    """The keys of all whole chunks."""
    size, key, keys = pool.layout(model).tokens_per_page, pool.root_key(model, tenant), []
    for start in range(0, len(tokens) - size + 1, size):
        key = next_key(key, tokens[start : start + size])
        keys.append(key)
    return keys


def computed(pool: KvPool, tokens: list[int], model: ModelIndex = PLAIN) -> PageTable:
    """A table whose whole chunks are published."""
    table = pool.open(model, DEVICE)
    assert pool.grow(table, len(tokens))
    pool.publish(table, keys_of(pool, model, tokens))
    return table


def test_the_same_beginning_is_held_and_nothing_else() -> None:
    pool = make_pool(40)
    tokens = list(range(70))
    first = computed(pool, tokens)
    size, groups = first.layout.tokens_per_page, len(first.groups)
    assert size == 16 and groups == 2
    other = [*tokens[:40], *range(500, 530)]
    keys = keys_of(pool, PLAIN, other)
    assert pool.find(keys)[:2] == (2, 2)
    second = pool.open(PLAIN, DEVICE)
    pool.share(second, keys)
    assert second.tokens == 32 and second.pages == 2 * groups
    assert [group[:2] for group in second.groups] == [group[:2] for group in first.groups]
    assert pool.grow(second, 70)
    assert not set(second.groups[0][2:]) & set(first.groups[0])
    assert pool.held_by(PLAIN) == first.pages + second.pages - 2 * groups
    pool.check([first, second])


def test_what_nobody_holds_stays_and_counts_as_available() -> None:
    pool = make_pool(10)
    table = computed(pool, list(range(70)))
    assert (pool.free, pool.cached) == (0, 0)
    pool.release(table)
    pool.check([])
    assert (pool.free, pool.cached, pool.available_on(DEVICE)) == (2, 8, 10)
    assert pool.held_by(PLAIN) == 0
    assert pool.find(keys_of(pool, PLAIN, list(range(70))))[:2] == (4, 0)


def test_a_page_that_is_needed_is_taken_from_the_end_of_the_least_recently_held() -> None:
    pool = make_pool(16)
    old, new = list(range(64)), list(range(100, 164))
    for tokens in (old, new):
        pool.release(computed(pool, tokens))
    assert (pool.free, pool.cached) == (0, 16)
    table = pool.open(PLAIN, DEVICE)
    for gone in range(1, 9):
        assert pool.grow(table, gone * 16)
        assert pool.evicted[PLAIN] == gone * 2
        pool.check([table])
        left = [pool.find(keys_of(pool, PLAIN, tokens)).chunks for tokens in (old, new)]
        assert left == [max(0, 4 - gone), min(4, 8 - gone)]
    assert not pool.grow(table, 9 * 16)


def test_what_is_held_is_never_given_up() -> None:
    pool = make_pool(10)
    tokens = list(range(64))
    pool.release(computed(pool, tokens))
    holder = pool.open(PLAIN, DEVICE)
    pool.share(holder, keys_of(pool, PLAIN, tokens)[:3])
    other = pool.open(PLAIN, DEVICE)
    assert pool.grow(other, 32) and not pool.grow(other, 33)
    pool.check([holder, other])
    assert pool.find(keys_of(pool, PLAIN, tokens))[:2] == (3, 3)
    pool.release(holder)
    assert pool.grow(other, 80)


def test_one_of_two_equal_chunks_gives_its_pages_back() -> None:
    pool = make_pool(20)
    tokens = list(range(40))
    first = computed(pool, tokens)
    free = pool.free
    second = computed(pool, tokens)
    assert pool.free == free - 2, "only the chunk that is not full is its own"
    assert [group[:2] for group in second.groups] == [group[:2] for group in first.groups]
    pool.check([first, second])
    pool.release(first)
    pool.check([second])
    assert pool.find(keys_of(pool, PLAIN, tokens))[:2] == (2, 2)


def test_keys_tell_models_tenants_secrets_and_every_earlier_token_apart() -> None:
    pool = make_pool(40)
    tokens = list(range(64))
    computed(pool, tokens)
    changed = [[*tokens[:15], 99, *tokens[16:]], [99, *tokens[1:]]]
    assert [pool.find(keys_of(pool, PLAIN, other)).chunks for other in changed] == [0, 0]
    assert pool.find(keys_of(pool, PLAIN, [*tokens[:16], 99, *tokens[17:]])).chunks == 1
    assert pool.find(keys_of(pool, PLAIN, tokens, b"another")).chunks == 0
    assert pool.find(keys_of(pool, LATENT, tokens)).chunks == 0
    assert root_key(SECRET, PLAIN, b"") != root_key(b"t" * 32, PLAIN, b"")


def test_cached_pages_at_home_are_given_up_before_a_table_spreads() -> None:
    pool = make_pool(8, devices=2)
    tokens = list(range(64))
    pool.release(computed(pool, tokens))
    keys = keys_of(pool, PLAIN, tokens)
    assert pool.find(keys) == (4, 0, DEVICE)
    at_home, elsewhere = pool.open(PLAIN, DEVICE), pool.open(PLAIN, KvDevice(1))
    assert pool.grow(at_home, 16) and at_home.elsewhere == [] and pool.find(keys).chunks == 3
    assert pool.grow(elsewhere, 64) and elsewhere.elsewhere == [] and pool.find(keys).chunks == 3
    assert pool.grow(elsewhere, 80) and elsewhere.elsewhere == [DEVICE] and pool.find(keys).chunks == 2
    pool.check([at_home, elsewhere])
    assert [pool.available_on(device) for device in pool.devices] == [4, 0]


def test_a_model_with_a_home_gives_up_nothing_elsewhere() -> None:
    pool = make_pool(8, devices=2, homes={PLAIN: KvDevice(1)})
    pool.release(computed(pool, list(range(32)), model=LATENT))
    table, cached = pool.open(PLAIN, KvDevice(1)), pool.cached
    assert cached and pool.grow(table, 64) and not pool.grow(table, 65) and pool.cached == cached


def test_models_with_windows_and_pools_without_a_secret_have_no_cache() -> None:
    assert [make_pool(9).caches(model) for model in (PLAIN, LATENT, WINDOWED)] == [True, True, False]
    assert not make_pool(9, secret=None).caches(PLAIN)


def test_a_wrong_account_is_an_error() -> None:
    pool = make_pool(10)
    table = computed(pool, list(range(64)))
    with pytest.raises(InvariantError, match="rests though it is held"):
        pool.check([])
    pool._cache.rest(table.shared[-1])
    with pytest.raises(InvariantError, match="rests though it is held"):
        pool.check([table])


def test_random_use_keeps_the_account() -> None:
    rng = random.Random(11)
    pool, tables = make_pool(30), []
    stories = [[rng.randrange(50) for _ in range(rng.randint(1, 120))] for _ in range(4)]
    stories += [story[: rng.randint(1, len(story))] + stories[0] for story in stories]
    for _ in range(3000):
        if rng.random() < 0.5:
            model, tokens = rng.choice((PLAIN, LATENT)), rng.choice(stories)
            table, keys = pool.open(model, DEVICE), keys_of(pool, model, tokens)
            pool.share(table, keys[: rng.randint(0, len(keys))])
            tables.append(table)
            if pool.grow(table, len(tokens)):
                size = table.layout.tokens_per_page
                pool.publish(table, keys[len(table.shared) : rng.randint(0, len(tokens)) // size])
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
    assert pool.evicted[PLAIN] and pool.evicted[LATENT]


def test_shared_chunks_are_on_the_account_of_all_who_hold_them() -> None:
    pool = make_pool(40)
    tokens = list(range(64))
    first = computed(pool, tokens)
    assert pool.shared_by_others(first) == 0
    second = pool.open(PLAIN, DEVICE)
    assert pool.shared_by_others(second) == 0
    pool.share(second, keys_of(pool, PLAIN, tokens)[:3])
    assert [pool.shared_by_others(table) for table in (first, second)] == [3 * 2 / 2] * 2
    pool.release(first)
    assert pool.shared_by_others(second) == 0
