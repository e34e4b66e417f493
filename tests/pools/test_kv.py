"""Page tables of several models over the same pages."""

from __future__ import annotations

import pytest

from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import NULL_PAGE, KvDevice, ModelIndex
from crosspool.core.kv_layout import make_layout
from crosspool.pools.kv import KvPool
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

PLAIN, LATENT, WINDOWED = ModelIndex(0), ModelIndex(1), ModelIndex(2)
DEVICE = KvDevice(0)


def make_pool(pages: int, *, devices: int = 1, homes: dict[ModelIndex, KvDevice] | None = None) -> KvPool:
    specs = [gqa_spec(layers=4), mla_spec(layers=3), gqa_spec(windows=(None, 20, 20))]
    page_bytes = 32 * specs[0].kv_bytes_per_token_layer
    layouts = {ModelIndex(i): make_layout(spec, page_bytes) for i, spec in enumerate(specs)}
    return KvPool(layouts, DevicePages.of([pages] * devices), step_tokens=16, homes=homes)


def test_a_page_freed_by_one_model_is_used_by_another() -> None:
    pool = make_pool(4)
    plain, latent = pool.open(PLAIN, DEVICE), pool.open(LATENT, DEVICE)
    assert pool.grow(plain, 32) and pool.free == 0
    used = set(plain.held())
    assert not pool.grow(latent, 1)
    pool.release(plain)
    assert pool.grow(latent, 1)
    assert set(latent.held()) <= used
    assert (pool.held_by(PLAIN), pool.held_by(LATENT)) == (0, latent.pages)
    pool.check([plain, latent])


def test_growth_is_atomic_over_groups() -> None:
    pool = make_pool(3)
    table = pool.open(PLAIN, DEVICE)
    assert len(table.groups) == 2
    assert pool.grow(table, 16) and pool.free == 1
    before = table.snapshot()
    assert not pool.grow(table, 17)
    assert table.snapshot() == before and pool.free == 1
    assert pool.missing(table, 17) == 2 and pool.missing(table, 16) == 0


def test_a_page_aligned_sequence_takes_no_page_more() -> None:
    pool = make_pool(8)
    table = pool.open(PLAIN, DEVICE)
    pool.grow(table, 16)
    assert (table.tokens, table.pages) == (16, 2)
    pool.grow(table, 17)
    assert (table.tokens, table.pages) == (32, 4)


def test_window_pages_come_back_while_the_sequence_goes_on() -> None:
    pool = make_pool(20)
    table = pool.open(WINDOWED, DEVICE)
    pool.grow(table, 96)
    full, window = (group.window for group in table.layout.groups)
    assert (full, window) == (None, 20)
    held = table.pages
    pool.trim(table, 90)
    assert table.groups[1][:4] == [NULL_PAGE] * 4 and NULL_PAGE not in table.groups[1][4:]
    assert table.pages == held - 4 and table.snapshot()[1][0] == NULL_PAGE
    pool.trim(table, 90)
    pool.check([table])
    pool.release(table)
    assert pool.free == pool.total and table.chunks == 0
    pool.check([])


def test_the_longest_sequence_fits_and_one_token_more_does_not() -> None:
    for pages in (3, 7, 20):
        pool = make_pool(pages)
        for model in (PLAIN, LATENT):
            most = pool.most_tokens(model)
            table = pool.open(model, DEVICE)
            assert pool.grow(table, most) and not pool.grow(table, most + 1)
            pool.release(table)


def test_a_windowed_model_is_longer_than_its_pages() -> None:
    pool = make_pool(30)
    most = pool.most_tokens(WINDOWED)
    table, position = pool.open(WINDOWED, DEVICE), 0
    while position < most:
        position = min(most, position + 16)
        assert pool.grow(table, position)
        pool.trim(table, position)
    assert most > 30 * 16 // 2


def test_pages_come_from_home_as_long_as_it_has_some() -> None:
    pool = make_pool(5, devices=3)
    home = KvDevice(1)
    table, other = pool.open(PLAIN, home), pool.open(PLAIN, KvDevice(2))
    assert pool.grow(other, 16) and pool.grow(table, 32)
    assert (table.held_on, table.elsewhere) == ([0, 4, 0], [])
    assert pool.grow(table, 64)
    assert (table.held_on, table.elsewhere) == ([3, 5, 0], [0]), "the one with most free pages lends them"
    assert pool.grow(table, 6 * 16) and table.elsewhere == [0, 2]
    before = table.snapshot()
    assert not pool.grow(table, 6 * 16 + 1) and table.snapshot() == before and pool.free == 1
    pool.check([table, other])
    pool.release(table)
    assert [pool.available_on(device) for device in pool.devices] == [5, 5, 3]
    assert table.elsewhere == []
    pool.check([other])


def test_one_sequence_can_have_every_page_of_every_device() -> None:
    for pages, devices in ((3, 2), (7, 3), (20, 2)):
        pool = make_pool(pages, devices=devices)
        for model in (PLAIN, LATENT):
            most = pool.most_tokens(model)
            table = pool.open(model, KvDevice(devices - 1))
            assert pool.grow(table, most) and not pool.grow(table, most + 1)
            assert pool.free < len(table.groups), "less than a chunk is left"
            pool.check([table])
            pool.release(table)


def test_trimmed_pages_go_back_to_their_devices() -> None:
    pool = make_pool(4, devices=2)
    table, position = pool.open(WINDOWED, KvDevice(0)), 0
    spread = set()
    while position < pool.most_tokens(WINDOWED):
        position += 16
        assert pool.grow(table, position)
        pool.trim(table, position)
        pool.check([table])
        spread.add(tuple(table.elsewhere))
    assert spread == {(), (1,)}
    assert table.held_on[0] + table.held_on[1] == table.pages


def test_a_page_counted_on_another_device_is_found() -> None:
    pool = make_pool(4, devices=2)
    table = pool.open(PLAIN, KvDevice(0))
    assert pool.grow(table, 48)
    table.held_on.reverse()
    with pytest.raises(InvariantError, match="counts"):
        pool.check([table])


def test_a_model_with_a_home_has_no_page_elsewhere() -> None:
    pool = make_pool(4, devices=2, homes={PLAIN: KvDevice(1)})
    assert (pool.reach(PLAIN), pool.reach(LATENT)) == ((KvDevice(1),), (KvDevice(0), KvDevice(1)))
    assert pool.most_tokens(PLAIN) == 32 and pool.most_tokens(LATENT) > make_pool(4).most_tokens(LATENT)
    plain, latent = pool.open(PLAIN, KvDevice(1)), pool.open(LATENT, KvDevice(1))
    assert pool.grow(plain, 32) and not pool.grow(plain, 33)
    assert plain.elsewhere == [] and pool.available_on(KvDevice(1)) == 0
    assert pool.grow(latent, 1) and latent.elsewhere == [KvDevice(0)]
    pool.check([plain, latent])
