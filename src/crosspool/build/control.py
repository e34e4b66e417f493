"""Puts the control plane together, without torch: what the real engine, the simulator and the tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from crosspool.core.config import EngineConfig
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import ConfigError, OutOfMemoryError
from crosspool.core.ids import ModelIndex, Nanoseconds
from crosspool.core.info import EngineInfo, ModelInfo
from crosspool.core.kv_layout import KvLayout, choose_page_bytes, make_layout
from crosspool.core.protocols import Clock, Executor
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Topology
from crosspool.costs.layer import HardwareProfile
from crosspool.engine.engine import Engine
from crosspool.pools.ffn import FfnPool
from crosspool.pools.kv import KvPool
from crosspool.scheduler.pipeline import Pipeline
from crosspool.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Sizes of the pools before anything is allocated. ``layouts`` are in the order of the specs given."""

    page_bytes: int
    pages_per_device: int
    kv_devices: int
    weights_pool_bytes: int
    layouts: tuple[KvLayout, ...]

    @property
    def places(self) -> DevicePages:
        """Which page is on which KV device."""
        return DevicePages.of([self.pages_per_device] * self.kv_devices)

    @property
    def kv_pool_bytes(self) -> int:
        return self.page_bytes * self.places.total


def plan_pools(config: EngineConfig, specs: Sequence[ModelSpec], available_bytes: int) -> PoolPlan:
    """Size both pools for these models within ``available_bytes`` of free memory.

    Raises OutOfMemoryError if pools and attention-side weights do not fit together, and ConfigError if the
    KV pool is too small to hold anything of some model.
    """
    pools, devices = config.pools, len(config.kv_devices)
    page_bytes = pools.page_bytes or choose_page_bytes(specs)
    layouts = tuple(make_layout(spec, page_bytes) for spec in specs)
    attention = sum(spec.attention_side_bytes for spec in specs)
    ffns = (sum(ffn_bytes_by_layer(spec, config.topology)) for spec in specs)
    weights_pool = pools.weights_pool_bytes or sum(ffns)
    left = available_bytes - attention - weights_pool
    kv_pool = pools.kv_pool_bytes or int(max(0, left) * pools.kv_pool_fraction)
    pages = kv_pool // (devices * page_bytes)
    smallest = max(len(layout.groups) for layout in layouts)
    if left < kv_pool or (pools.kv_pool_bytes is None and pages < smallest):
        raise OutOfMemoryError(
            f"the pools do not fit this machine's memory (weights pool {weights_pool:,}, attention side "
            f"{attention:,}, KV pool {kv_pool:,})",
            needed=attention + weights_pool + max(kv_pool, smallest * page_bytes * devices),
            free=available_bytes,
        )
    if pages < smallest:
        raise ConfigError(
            f"a KV pool of {kv_pool:,} bytes on {devices} device(s) has {pages} pages of {page_bytes:,} "
            f"bytes on each; at least {smallest} are needed for the shortest sequence"
        )
    return PoolPlan(page_bytes, pages, devices, weights_pool, layouts)


def ffn_bytes_by_layer(spec: ModelSpec, topology: Topology) -> list[int]:
    """Bytes of each layer's FFN, on all devices that share it."""
    return [spec.ffn_bytes(layer, len(topology.ffn_devices(layer))) for layer in range(spec.num_layers)]


def assemble(
    config: EngineConfig,
    models: Sequence[ModelInfo],
    specs: Mapping[ModelIndex, ModelSpec],
    plan: PoolPlan,
    ffn_pool: FfnPool,
    executor: Executor,
    clock: Clock,
    profile: HardwareProfile | None = None,
) -> Engine:
    """The engine over an executor.

    ``specs`` holds the models that loaded, in the order of the plan's layouts; ``models`` every configured
    one.
    """
    pool = KvPool(
        dict(zip(specs, plan.layouts, strict=True)),
        devices=plan.kv_devices,
        pages_per_device=plan.pages_per_device,
        step_tokens=max(config.scheduler.max_chunk_tokens, config.scheduler.decode_steps),
    )
    scheduler = Scheduler(
        pool,
        Pipeline(specs, profile or HardwareProfile(), config.scheduler),
        config.scheduler,
        {index: _targets(config, index) for index in specs},
        lanes=1 if config.topology.one_device else 2,
    )
    info = EngineInfo(
        models=tuple(
            _with_pools(model, specs.get(model.index), config.topology, pool, ffn_pool) for model in models
        ),
        kv_devices=config.kv_devices,
        weights_devices=config.weights_devices,
        page_bytes=plan.page_bytes,
        kv_pages=pool.total,
        kv_pool_bytes=plan.kv_pool_bytes,
        weights_pool_bytes=ffn_pool.budget,
        weights_used_bytes=ffn_pool.used,
    )
    return Engine(info, scheduler, pool, executor, clock)


def _targets(config: EngineConfig, index: ModelIndex) -> tuple[Nanoseconds, Nanoseconds]:
    model, scheduler = config.models[index], config.scheduler
    return (model.ttft_target or scheduler.ttft_target, model.tbt_target or scheduler.tbt_target)


def _with_pools(
    model: ModelInfo, spec: ModelSpec | None, topology: Topology, pool: KvPool, ffn_pool: FfnPool
) -> ModelInfo:
    """The model's entry with what its spec and the pools say."""
    if spec is None:
        return model
    layout = pool.layout(model.index)
    return replace(
        model,
        architecture=spec.architecture,
        dtype=spec.dtype,
        weights_dtype="int8" if spec.int8_weights else spec.dtype,
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        max_pool_tokens=pool.most_tokens(model.index),
        eos_token_ids=spec.eos_token_ids,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        tokens_per_page=layout.tokens_per_page,
        layer_groups=len(layout.groups),
        attention_bytes=spec.attention_side_bytes,
        ffn_bytes=sum(ffn_bytes_by_layer(spec, topology)),
        residency=ffn_pool.residency(model.index),
    )
