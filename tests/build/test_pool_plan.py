"""Pools sized for devices of a stated memory, and models bound to devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crosspool.build.pool_plan import choose_homes, plan_pools
from crosspool.build.quotas import quotas_of
from crosspool.core.config import EngineConfig, Mode, ModelConfig, PoolConfig
from crosspool.core.errors import ConfigError, OutOfMemoryError
from crosspool.core.ids import KvDevice, ModelIndex
from crosspool.core.kv_layout import make_layout
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Sharding
from crosspool.pools.quotas import Quota
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

PAGE, MEMORY, TWO = 4096, 1 << 20, ("cpu:0", "cpu:1")
SPECS = {
    ModelIndex(0): gqa_spec(layers=12),
    ModelIndex(1): mla_spec(layers=3),
    ModelIndex(2): gqa_spec(layers=4),
    ModelIndex(3): gqa_spec(layers=2),
}


def config_of(device_bytes: int | None, mode: Mode = Mode.CROSSPOOL, **how) -> EngineConfig:
    models = tuple(ModelConfig(f"m{index}", "nowhere") for index in SPECS)
    return EngineConfig(models, PoolConfig(device_bytes=device_bytes, page_bytes=PAGE), mode=mode, **how)


def whole(spec: ModelSpec) -> int:
    return spec.attention_side_bytes + spec.total_ffn_bytes


def test_kv_gets_what_attention_sides_leave_of_its_device() -> None:
    attention = sum(spec.attention_side_bytes for spec in SPECS.values())
    plan = plan_pools(config_of(MEMORY, kv_devices=("cpu:0",), weights_devices=("cpu:1",)), SPECS, 1 << 40)
    assert plan.places.total == (MEMORY - attention) // PAGE
    assert plan.homes == {} and plan.home(ModelIndex(3)) == KvDevice(0)


def test_kv_gets_what_all_weights_leave_of_one_device() -> None:
    plan = plan_pools(config_of(MEMORY), SPECS, 1 << 40)
    assert plan.places.total == (MEMORY - sum(map(whole, SPECS.values()))) // PAGE


@pytest.mark.parametrize("copies", [False, True])
def test_attention_sides_are_on_the_first_kv_device_or_on_all(copies: bool) -> None:
    config = config_of(MEMORY, kv_devices=TWO, weights_devices=("cpu:2",))
    plan = plan_pools(config, SPECS, 1 << 40, copies_attention=copies)
    attention = sum(spec.attention_side_bytes for spec in SPECS.values())
    for device, used in enumerate([attention, attention * copies]):
        assert len(plan.places.pages_of(KvDevice(device))) == (MEMORY - used) // PAGE


@pytest.mark.parametrize("mode", [Mode.MONOLITHIC, Mode.STATIC])
def test_each_device_has_its_models_and_their_kv(mode: Mode) -> None:
    plan = plan_pools(config_of(MEMORY, mode, kv_devices=TWO, weights_devices=TWO), SPECS, 1 << 40)
    weights = [sum(whole(SPECS[m]) for m, home in plan.homes.items() if home == device) for device in (0, 1)]
    assert set(plan.homes) == set(SPECS) and min(weights) > 0
    for device, used in enumerate(weights):
        assert len(plan.places.pages_of(KvDevice(device))) == (MEMORY - used) // PAGE
    assert max(weights) <= 4 / 3 * max(sum(weights) / 2, max(map(whole, SPECS.values())))


@pytest.mark.parametrize("mode", [Mode.MONOLITHIC, Mode.STATIC])
def test_models_that_are_cut_have_kv_on_all_devices_beside_their_parts(mode: Mode) -> None:
    config = config_of(MEMORY, mode, kv_devices=TWO, weights_devices=TWO, sharding=Sharding.TENSOR)
    plan = plan_pools(config, SPECS, 1 << 40)
    assert plan.homes == {}
    ffns = sum(spec.ffn_bytes(layer, 2) for spec in SPECS.values() for layer in range(spec.num_layers))
    attention = sum(spec.attention_side_bytes for spec in SPECS.values())
    rest = 2 * MEMORY - ffns - attention
    assert rest // PAGE - 1 <= plan.places.total <= rest // PAGE
    if mode is Mode.STATIC:
        share = plan.places.total // len(SPECS)
        assert set(quotas_of(config, SPECS, plan).values()) == {Quota(share, share)}


def test_heads_are_kept_again_on_devices_that_are_more_than_they() -> None:
    """Latents are one head of all; a model of three key-value heads keeps each twice on four devices."""
    four = tuple(f"cpu:{n}" for n in range(4))
    specs = {ModelIndex(0): gqa_spec(layers=4, kv_heads=3), ModelIndex(1): mla_spec(layers=4)}
    once = {model: make_layout(spec, 16 * PAGE).tokens_per_page for model, spec in specs.items()}

    def tokens_per_page(mode: Mode, sharding: Sharding) -> dict[ModelIndex, int]:
        config = config_of(None, mode, kv_devices=four, weights_devices=four, sharding=sharding)
        config = replace(config, pools=PoolConfig(page_bytes=16 * PAGE, kv_pool_bytes=1 << 24))
        layouts = plan_pools(config, specs, 1 << 40).layouts
        assert all(layouts[m].bytes_per_token_layer == specs[m].kv_bytes_per_token_layer for m in specs)
        return {model: layout.tokens_per_page for model, layout in layouts.items()}

    cut = tokens_per_page(Mode.MONOLITHIC, Sharding.TENSOR)
    assert [cut[model] for model in specs] == [once[ModelIndex(0)] // 2, once[ModelIndex(1)] // 4]
    assert tokens_per_page(Mode.MONOLITHIC, Sharding.LAYER) == once
    assert tokens_per_page(Mode.CROSSPOOL, Sharding.TENSOR) == once


def test_in_two_pools_no_model_has_a_home() -> None:
    assert choose_homes(config_of(None, kv_devices=TWO, weights_devices=TWO).topology, SPECS) == {}


def test_weights_that_do_not_fit_a_device_are_named_with_the_bytes() -> None:
    ffns = sum(spec.total_ffn_bytes for spec in SPECS.values())
    small = ffns - 1
    config = config_of(small, kv_devices=("cpu:0",), weights_devices=("cpu:1",))
    with pytest.raises(OutOfMemoryError, match=rf"on cpu:1 do not fit .* {ffns:,} bytes needed, {small:,} "):
        plan_pools(config, SPECS, 1 << 40)


def test_devices_may_not_promise_more_than_the_machine_has() -> None:
    with pytest.raises(OutOfMemoryError, match=f"{MEMORY // 2:,} bytes free"):
        plan_pools(config_of(MEMORY), SPECS, MEMORY // 2)


def test_a_home_without_a_page_for_its_model_is_refused() -> None:
    largest = max(map(whole, SPECS.values()))
    assert largest > sum(map(whole, SPECS.values())) - largest
    config = config_of(largest + PAGE - 1, Mode.MONOLITHIC, kv_devices=TWO, weights_devices=TWO)
    with pytest.raises(OutOfMemoryError, match="0 KV pages of 4,096 bytes for model m0"):
        plan_pools(config, SPECS, 1 << 40)


def test_the_spill_store_is_as_large_as_the_kv_pool_where_memory_is_left() -> None:
    """Of what weights and KV pool leave free it takes a quarter at most."""
    weights, pool = sum(map(whole, SPECS.values())), 100 * PAGE

    def spill_pages(left: int, asked: int | None = None) -> int:
        pools = PoolConfig(kv_pool_bytes=pool, page_bytes=PAGE, spill_bytes=asked)
        return plan_pools(replace(config_of(None), pools=pools), SPECS, weights + pool + left).spill_pages

    assert spill_pages(1 << 40) == 100
    assert [spill_pages(left * PAGE) for left in (400, 399, 40, 3)] == [100, 99, 10, 0]
    assert [spill_pages(400 * PAGE, asked) for asked in (0, 400 * PAGE, PAGE - 1)] == [0, 400, 0]
    with pytest.raises(OutOfMemoryError, match=rf"spill store {401 * PAGE:,}\)"):
        spill_pages(400 * PAGE, 401 * PAGE)


def test_one_way_to_size_the_pool() -> None:
    with pytest.raises(ConfigError, match="not 1,000 and 2,000"):
        PoolConfig(kv_pool_bytes=1000, device_bytes=2000)


@pytest.mark.parametrize("sharding", [Sharding.LAYER, Sharding.TENSOR])
@pytest.mark.parametrize("mode", [Mode.MONOLITHIC, Mode.STATIC])
def test_one_memory_needs_devices_that_do_both(mode: Mode, sharding: Sharding) -> None:
    with pytest.raises(ConfigError, match="not cpu:0 and cpu:1"):
        config_of(None, mode, kv_devices=("cpu:0",), weights_devices=("cpu:1",), sharding=sharding)


def test_a_static_partition_divides_each_device_among_its_models() -> None:
    config = config_of(MEMORY, Mode.STATIC, kv_devices=TWO, weights_devices=TWO)
    plan = plan_pools(config, SPECS, 1 << 40)
    quotas = quotas_of(config, SPECS, plan)
    for device in plan.places.devices:
        own = [quotas[model] for model, home in plan.homes.items() if home == device]
        share = len(plan.places.pages_of(device)) // len(own)
        assert own == [Quota(share, share)] * len(own)


def test_a_static_share_that_was_asked_for_leaves_the_others_the_rest() -> None:
    config = config_of(MEMORY, Mode.STATIC)
    models = (replace(config.models[0], kv_cap_bytes=10 * PAGE), *config.models[1:])
    config = replace(config, models=models, kv_devices=("cpu:0",), weights_devices=("cpu:0",))
    plan = plan_pools(config, SPECS, 1 << 40)
    rest = (plan.places.total - 10) // 3
    assert list(quotas_of(config, SPECS, plan).values()) == [Quota(10, 10)] + [Quota(rest, rest)] * 3
