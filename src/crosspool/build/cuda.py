"""An engine on GPUs: what each device's memory is for, and from loaded weights to the executor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from crosspool.backends.cuda import CudaDevice
from crosspool.backends.device import Device
from crosspool.backends.factory import make_cuda_devices
from crosspool.backends.host_memory import free_bytes
from crosspool.build.pool_plan import (
    PoolPlan,
    choose_homes,
    choose_layouts,
    plan_pools,
    weights_on_devices,
)
from crosspool.build.workers import Compiling, Specs
from crosspool.core.config import EngineConfig, Kernels, WeightsMemory
from crosspool.core.errors import ConfigError, OutOfMemoryError
from crosspool.core.ids import KvDevice, ModelIndex, Nanoseconds
from crosspool.core.kv_layout import KvLayout
from crosspool.core.protocols import Executor
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Topology
from crosspool.costs.layer import HardwareProfile
from crosspool.models.weights import AttentionSideWeights, FfnWeights, part_of_ffn
from crosspool.workers.clock import MonotonicClock
from crosspool.workers.cuda.attention import KvPages
from crosspool.workers.cuda.copies import HostPages, PageCopier
from crosspool.workers.cuda.executor import CudaExecutor
from crosspool.workers.cuda.feeder import Feeder, routes_of
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.home import GrantLimits, Home, HomePlan, Key
from crosspool.workers.cuda.model import TENSORS_PER_LAYER, DeviceModel, FfnPlace
from crosspool.workers.cuda.room import ALIGNMENT
from crosspool.workers.cuda.weights import WeightsArena

USABLE = 0.95
"""Of a GPU's free memory. The rest is for compiled code, recorded graphs and what CUDA itself takes."""

MOST_SPILL_BYTES = 32 << 30
"""Of the spill store, unless its size is given: pinned memory is taken as a whole at the start, and is nobody
else's until the end."""


class CudaMachine:
    """The GPUs of a configuration."""

    profile = HardwareProfile(
        operations_per_second=3e14,
        bytes_per_second=2e12,
        task_overhead=Nanoseconds(10_000),
        copy_bytes_per_second=25e9,
    )
    """Copies as over PCIe 4, the slowest link of GPUs that are supported; both directions are alike."""

    def __init__(self, config: EngineConfig) -> None:
        _check(config)
        self._config = config
        self._devices = make_cuda_devices(config.topology.teams)

    def held(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def plan(self, specs: Specs) -> PoolPlan:
        """With device_bytes, each device has so much; otherwise an equal part of what its GPU has free. Lanes
        and grants come first, then weights, and KV gets what is left, unless its size is given. The spill
        store is in host memory."""
        config, pools = self._config, replace(self._config.pools, spill_bytes=0)
        shares = [_share(device, self._devices) for device in self._devices]
        for device, share in zip(self._devices, shares, strict=True):
            if pools.device_bytes is not None and pools.device_bytes > share:
                what = f"device_bytes of {device.name}, of which there are more on its GPU"
                raise OutOfMemoryError(what, needed=pools.device_bytes, free=share)
        sizes = [pools.device_bytes or share for share in shares]
        besides = bytes_besides(config, specs, self._devices)
        left = min(size - own for size, own in zip(sizes, besides, strict=True))
        if left <= 0:
            worst = max(range(len(sizes)), key=lambda team: besides[team] - sizes[team])
            name = self._devices[worst].name
            raise OutOfMemoryError(f"lanes and grants on {name}", needed=besides[worst], free=sizes[worst])
        if pools.kv_pool_bytes is None:
            pools = replace(pools, device_bytes=left)
        plan = plan_pools(replace(config, pools=pools), specs, left * len(sizes), copies_attention=True)
        return _with_spill_store(plan, config.pools.spill_bytes, free_bytes())

    def workers(self, plan: PoolPlan, specs: Specs) -> CudaWorkers:
        return CudaWorkers(self._config, self._devices, plan, specs)


def _check(config: EngineConfig) -> None:
    """Raises ConfigError for what GPUs cannot do in this version."""
    if config.kernels is Kernels.REFERENCE:
        raise ConfigError("the reference kernels run on CPU devices only")
    if config.pools.weights_memory is not WeightsMemory.MAPPED:
        raise ConfigError(f"weights_memory {config.pools.weights_memory} is about CPU devices")
    for model in config.models:
        if model.weights_dtype == "int8":
            raise ConfigError(f"model {model.name}: weights_dtype int8 needs CPU devices")


def _share(device: CudaDevice, devices: tuple[CudaDevice, ...]) -> int:
    """Bytes that a device may use, of which there may be several on its GPU."""
    return int(device.free_bytes * USABLE) // sum(other.physical == device.physical for other in devices)


def _with_spill_store(plan: PoolPlan, asked: int | None, free: int) -> PoolPlan:
    """``free`` is of host memory. Raises OutOfMemoryError if more is asked for."""
    size = min(plan.kv_pool_bytes, free // 4, MOST_SPILL_BYTES) if asked is None else asked
    if size > free:
        raise OutOfMemoryError("a spill store in pinned host memory", needed=size, free=free)
    return replace(plan, spill_pages=size // plan.page_bytes)


def weights_bytes(spec: ModelSpec, topology: Topology, home: KvDevice) -> list[int]:
    """What the weights of a model take on the devices of all teams. Each device has its part of an FFN, and a
    router of its own."""
    needed = [0] * len(topology.teams)
    for place in topology.attention_devices(home):
        needed[topology.attention_team(place)] += spec.attention_side_bytes
    for number, layer in enumerate(spec.layers):
        for part, device in enumerate(topology.ffn_devices(number, home)):
            own = part_of_ffn(layer.ffn, part, topology.ffn_parts)
            needed[topology.weights_team(device)] += spec.bytes_of_ffn(own)
    return needed


def bytes_between(spec: ModelSpec) -> int:
    """What of an arena a model's weights leave unused between them, at most, and its tables of words."""
    layers = spec.num_layers
    return ALIGNMENT * (TENSORS_PER_LAYER * (layers + 1) + layers) + 4 * spec.rope.dim


def bytes_besides(config: EngineConfig, specs: Specs, devices: Sequence[Device]) -> list[int]:
    """What each team's device needs beside KV and the weights that pools are planned with: of shared FFNs a
    part may be larger than an equal share."""
    topology, (_, layouts) = config.topology, choose_layouts(config, specs)
    homes = choose_homes(topology, specs)
    keys: dict[KvDevice, set[Key]] = {}
    for model, spec in specs.items():
        geometry = Geometry.of(spec, layouts[model])
        for home in topology.attention_devices(homes.get(model, KvDevice(0))):
            keys.setdefault(home, set()).update(keys_of(topology, home, geometry))
    between = sum(bytes_between(spec) for spec in specs.values())
    planned = weights_on_devices(topology, specs, homes, topology.attention_devices)
    needed = [between - planned[name] for name in topology.teams]
    for model, spec in specs.items():
        for team, size in enumerate(weights_bytes(spec, topology, homes.get(model, KvDevice(0)))):
            needed[team] += size
    for home, own in keys.items():
        try:
            sizes = home_plan(config, devices, home, own).device_bytes()
        except (ValueError, KeyError) as error:
            raise ConfigError(f"no kernels for GPUs: {error}") from error
        for team, size in sizes.items():
            needed[team] += size
    return needed


def keys_of(topology: Topology, home: KvDevice, geometry: Geometry) -> list[Key]:
    """What is prepared for models of a geometry, where they are at home here."""
    return [(geometry, route) for route in routes_of(topology, home, geometry.num_layers)]


def home_plan(
    config: EngineConfig, devices: Sequence[Device], home: KvDevice, keys: Collection[Key]
) -> HomePlan:
    topology, own = config.topology, config.scheduler
    limits = GrantLimits(
        decode_rows=own.max_batch_rows,
        prefill_rows=own.max_prefill_rows,
        prefill_tokens=own.max_chunk_tokens,
        steps=own.decode_steps,
        sequences=own.max_running,
    )
    return HomePlan(topology.attention_team(home), devices, keys, limits, topology.ffn_parts)


class CudaWorkers:
    """Takes models into the memory of their devices, and makes the executor that runs them there."""

    def __init__(self, config: EngineConfig, devices: Sequence[Device], plan: PoolPlan, specs: Specs) -> None:
        self._config, self._devices, self._plan = config, devices, plan
        topology = config.topology
        self._kv = [
            devices[topology.attention_team(home)].tensor(
                (len(plan.places.pages_of(home)), plan.page_bytes), torch.uint8
            )
            for home in plan.places.devices
        ]
        self._host = HostPages(devices[0], plan.spill_pages, plan.page_bytes)
        self._arenas = {}
        for team, device in enumerate(devices):
            sizes = [
                weights_bytes(spec, topology, plan.home(model))[team] + bytes_between(spec)
                for model, spec in specs.items()
            ]
            self._arenas[team] = WeightsArena(device, sum(sizes))
        self._models: dict[ModelIndex, DeviceModel] = {}
        self._used: dict[int, int] = {}

    def put_attention_side(
        self, model: ModelIndex, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights
    ) -> None:
        self._used = {team: arena.room.used for team, arena in self._arenas.items()}
        topology = self._config.topology
        devices = topology.attention_devices(self._plan.home(model))
        homes = [topology.attention_team(device) for device in devices]
        self._models[model] = DeviceModel(spec, layout, weights, self._arenas, homes)

    def put_ffn(self, model: ModelIndex, layer: int, weights: FfnWeights) -> None:
        topology = self._config.topology
        devices = topology.ffn_devices(layer, self._plan.home(model))
        for part, device in enumerate(devices):
            place = FfnPlace(topology.weights_team(device), part, len(devices))
            self._models[model].put_ffn(layer, place, weights)

    def copies(self, spec: ModelSpec) -> bool:
        return True

    def remove(self, model: ModelIndex) -> None:
        """It is the one that was being put: what it has taken is free again."""
        self._models.pop(model, None)
        for team, used in self._used.items():
            self._arenas[team].forget(used)

    def start(self, compiling: Compiling) -> Executor:
        topology, plan = self._config.topology, self._plan
        for model in self._models.values():
            model.finish(topology.ffn_parts)
        runs: dict[KvDevice, dict[Key, DeviceModel]] = {}
        for index, model in self._models.items():
            for home in topology.attention_devices(plan.home(index)):
                for key in keys_of(topology, home, model.geometry):
                    runs.setdefault(home, {})[key] = model
        pages: dict[int, KvPages] = {
            topology.attention_team(device): KvPages(self._kv[device], plan.places.starts[device])
            for device in plan.places.devices
        }
        homes = []
        for home in plan.places.devices:
            models = runs.get(home, {})
            own = home_plan(self._config, self._devices, home, models.keys())
            homes.append(Home(own, pages, models, compiling))
        feeder = Feeder(topology, homes, self._models, own.limits, MonotonicClock())
        kv = [self._devices[topology.attention_team(home)] for home in plan.places.devices]
        copier = PageCopier(plan.places, kv, self._kv, self._host)
        return CudaExecutor(feeder, copier, self._devices)
