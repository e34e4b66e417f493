"""Sizes of both pools and of the spill store, and where each model lives, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from crosspool.core.config import EngineConfig
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import ConfigError, OutOfMemoryError
from crosspool.core.ids import KvDevice, ModelIndex
from crosspool.core.kv_layout import KvLayout, choose_page_bytes, make_layout
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Sharding, Topology

FIRST = KvDevice(0)


PlacesOf = Callable[[KvDevice], Sequence[KvDevice]]
"""The KV devices that have the attention sides of models with a home."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """``places`` says how many pages are on which KV device. A model that has a home keeps its KV there.
    ``spill_pages`` is how many pages host memory has room for."""

    page_bytes: int
    places: DevicePages
    weights_pool_bytes: int
    layouts: Mapping[ModelIndex, KvLayout]
    homes: Mapping[ModelIndex, KvDevice]
    spill_pages: int = 0

    @property
    def spill_bytes(self) -> int:
        return self.page_bytes * self.spill_pages

    @property
    def kv_pool_bytes(self) -> int:
        return self.page_bytes * self.places.total

    def home(self, model: ModelIndex) -> KvDevice:
        """The device that has the model's attention side."""
        return self.homes.get(model, FIRST)


def plan_pools(
    config: EngineConfig,
    specs: Mapping[ModelIndex, ModelSpec],
    available_bytes: int,
    *,
    copies_attention: bool = False,
) -> PoolPlan:
    """Size both pools and the spill store for these models within ``available_bytes`` of free memory.

    Where models have no homes, ``copies_attention`` says that every KV device has a copy of their attention
    sides, as devices do that do not read each other's memory; otherwise there is one, on the first.

    Raises OutOfMemoryError if these and attention-side weights do not fit together, or not each device, and
    ConfigError if the KV pool is too small to hold anything of some model.
    """
    pools = config.pools
    page_bytes, layouts = choose_layouts(config, specs)
    homes = choose_homes(config.topology, specs)
    ffns = sum(sum(ffn_bytes_by_layer(spec, config.topology)) for spec in specs.values())
    weights_pool = pools.weights_pool_bytes or ffns
    places_of = config.topology.attention_devices if copies_attention else lambda home: (home,)
    attention = sum(
        len(places_of(homes.get(model, FIRST))) * spec.attention_side_bytes for model, spec in specs.items()
    )
    if pools.device_bytes is None:
        left = available_bytes - attention - weights_pool
        kv_pool = pools.kv_pool_bytes or int(max(0, left) * pools.kv_pool_fraction)
        devices = len(config.kv_devices)
        places = DevicePages.of([kv_pool // (devices * page_bytes)] * devices)
    else:
        budgets = _left_on_devices(config.topology, specs, homes, places_of, pools.device_bytes)
        places = DevicePages.of([budget // page_bytes for budget in budgets])
        kv_pool = page_bytes * places.total
    spill = pools.spill_bytes
    if spill is None:
        spill = min(kv_pool, max(0, available_bytes - attention - weights_pool - kv_pool) // 4)
    _check_memory(attention, weights_pool, kv_pool, spill, available_bytes)
    plan = PoolPlan(page_bytes, places, weights_pool, layouts, homes, spill // page_bytes)
    _check_pages(config, plan)
    return plan


def choose_layouts(
    config: EngineConfig, specs: Mapping[ModelIndex, ModelSpec]
) -> tuple[int, dict[ModelIndex, KvLayout]]:
    """The bytes of a page, and how each model lays its tokens into it."""
    copies = {model: config.kv_copies(spec.attention.num_kv_heads) for model, spec in specs.items()}
    page_bytes = config.pools.page_bytes or max(copies.values()) * choose_page_bytes(specs.values())
    return page_bytes, {model: make_layout(spec, page_bytes, copies[model]) for model, spec in specs.items()}


def ffn_bytes_by_layer(spec: ModelSpec, topology: Topology) -> list[int]:
    """Bytes of each layer's FFN, on all devices that share it."""
    return [spec.ffn_bytes(layer, topology.ffn_parts) for layer in range(spec.num_layers)]


def choose_homes(topology: Topology, specs: Mapping[ModelIndex, ModelSpec]) -> dict[ModelIndex, KvDevice]:
    """Where models are bound to devices: each to the one with least weights so far, the largest first.

    Graham, "Bounds on Multiprocessing Timing Anomalies" (1969): no device gets more than 4/3 of the best
    division's largest share.
    """
    if topology.sharding is not Sharding.MODEL:
        return {}
    load = [0] * len(topology.kv_devices)
    homes = {}
    sizes = {model: spec.attention_side_bytes + spec.total_ffn_bytes for model, spec in specs.items()}
    for model in sorted(sizes, key=lambda model: (-sizes[model], model)):
        home = load.index(min(load))
        load[home] += sizes[model]
        homes[model] = KvDevice(home)
    return homes


def weights_on_devices(
    topology: Topology,
    specs: Mapping[ModelIndex, ModelSpec],
    homes: Mapping[ModelIndex, KvDevice],
    places_of: PlacesOf,
) -> dict[str, int]:
    """Bytes of weights by the devices' names: attention sides on all that ``places_of`` gives for a home.
    Those that share an FFN are taken to have equal parts."""
    used = dict.fromkeys(topology.teams, 0)
    for model, spec in specs.items():
        home = homes.get(model, FIRST)
        for place in places_of(home):
            used[topology.kv_devices[place]] += spec.attention_side_bytes
        for layer, size in enumerate(ffn_bytes_by_layer(spec, topology)):
            for device in topology.ffn_devices(layer, home):
                used[topology.weights_devices[device]] += -(-size // topology.ffn_parts)
    return used


def _left_on_devices(
    topology: Topology,
    specs: Mapping[ModelIndex, ModelSpec],
    homes: Mapping[ModelIndex, KvDevice],
    places_of: PlacesOf,
    device_bytes: int,
) -> Sequence[int]:
    """Bytes that weights leave of each KV device. Raises OutOfMemoryError if they do not fit some device."""
    used = weights_on_devices(topology, specs, homes, places_of)
    for name, needed in used.items():
        if needed > device_bytes:
            raise OutOfMemoryError(
                f"the weights on {name} do not fit its memory", needed=needed, free=device_bytes
            )
    return [device_bytes - used[name] for name in topology.kv_devices]


def _check_memory(attention: int, weights_pool: int, kv_pool: int, spill: int, available: int) -> None:
    needed = attention + weights_pool + kv_pool + spill
    if needed > available:
        raise OutOfMemoryError(
            f"the pools do not fit this machine's memory (weights pool {weights_pool:,}, attention side "
            f"{attention:,}, KV pool {kv_pool:,}, spill store {spill:,})",
            needed=needed,
            free=available,
        )


def _check_pages(config: EngineConfig, plan: PoolPlan) -> None:
    """Every model must find room for its shortest sequence."""
    for model, layout in plan.layouts.items():
        pages, needed = plan.places.total, len(layout.groups)
        if model in plan.homes:
            pages = len(plan.places.pages_of(plan.homes[model]))
        if pages >= needed:
            continue
        message = (
            f"{pages} KV pages of {plan.page_bytes:,} bytes for model {config.models[model].name}, whose "
            f"shortest sequence takes {needed}"
        )
        if config.pools.kv_pool_bytes is None:
            raise OutOfMemoryError(message, needed=needed * plan.page_bytes, free=pages * plan.page_bytes)
        raise ConfigError(f"a KV pool of {config.pools.kv_pool_bytes:,} bytes has {message}")
