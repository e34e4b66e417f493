"""Puts the control plane together, without torch: what the real engine, the simulator and the tests share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from crosspool.build.pool_plan import PoolPlan, ffn_bytes_by_layer
from crosspool.build.quotas import check_rooms, quotas_of
from crosspool.core.config import EngineConfig
from crosspool.core.ids import ModelIndex, Nanoseconds
from crosspool.core.info import EngineInfo, ModelInfo
from crosspool.core.protocols import Clock, Executor
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Topology
from crosspool.costs.copies import CopyCosts
from crosspool.costs.layer import HardwareProfile
from crosspool.engine.engine import Engine
from crosspool.pools.ffn import FfnPool
from crosspool.pools.kv import KvPool
from crosspool.pools.spill import SpillStore
from crosspool.scheduler.micro_batches import Lanes
from crosspool.scheduler.pipeline import Pipeline
from crosspool.scheduler.scheduler import Scheduler
from crosspool.scheduler.spilling import Spilling


def assemble(
    config: EngineConfig,
    models: Sequence[ModelInfo],
    specs: Mapping[ModelIndex, ModelSpec],
    plan: PoolPlan,
    ffn_pool: FfnPool,
    executor: Executor,
    clock: Clock,
    profile: HardwareProfile | None = None,
    lanes: Lanes | None = None,
) -> Engine:
    """The engine over an executor. ``lanes`` follow from the topology unless they are given.

    ``specs`` holds the models that loaded, ``models`` every configured one. Raises ConfigError if the models'
    shares of the KV pool cannot be kept.
    """
    layouts = {index: plan.layouts[index] for index in specs}
    pool = KvPool(
        layouts,
        plan.places,
        homes=plan.homes,
        step_tokens=max(config.scheduler.max_chunk_tokens, config.scheduler.decode_steps),
        quotas=quotas_of(config, layouts, plan),
        prefix_secret=secrets.token_bytes(32) if config.pools.prefix_cache else None,
    )
    check_rooms(config, pool, plan.page_bytes)
    profile = profile or HardwareProfile()
    pipeline = Pipeline(specs, profile, config.scheduler)
    scheduler = Scheduler(
        pool,
        pipeline,
        config.scheduler,
        {index: _targets(config, index) for index in specs},
        lanes=lanes or Lanes(alone=1 if config.topology.one_device else 2),
        spilling=Spilling(pool, SpillStore(plan.spill_pages), pipeline, CopyCosts(profile)),
    )
    info = EngineInfo(
        models=tuple(
            _with_pools(model, specs.get(model.index), config.topology, pool, ffn_pool, plan.page_bytes)
            for model in models
        ),
        kv_devices=config.kv_devices,
        weights_devices=config.weights_devices,
        page_bytes=plan.page_bytes,
        kv_pages=pool.total,
        kv_pool_bytes=plan.kv_pool_bytes,
        weights_pool_bytes=ffn_pool.budget,
        weights_used_bytes=ffn_pool.used,
        spill_store_bytes=plan.spill_bytes,
    )
    return Engine(info, scheduler, pool, executor, clock)


def _targets(config: EngineConfig, index: ModelIndex) -> tuple[Nanoseconds, Nanoseconds]:
    model, scheduler = config.models[index], config.scheduler
    return (model.ttft_target or scheduler.ttft_target, model.tbt_target or scheduler.tbt_target)


def _with_pools(
    model: ModelInfo,
    spec: ModelSpec | None,
    topology: Topology,
    pool: KvPool,
    ffn_pool: FfnPool,
    page_bytes: int,
) -> ModelInfo:
    """The model's entry with what its spec and the pools say."""
    if spec is None:
        return model
    layout = pool.layout(model.index)
    return replace(
        model,
        architecture=spec.architecture,
        dtype=spec.dtype,
        weights_dtype=spec.weights_dtype,
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        max_pool_tokens=pool.most_tokens(model.index),
        max_pool_bytes=pool.quotas(model.index).most(model.index) * page_bytes,
        eos_token_ids=spec.eos_token_ids,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        tokens_per_page=layout.tokens_per_page,
        layer_groups=len(layout.groups),
        prefix_cache=pool.caches(model.index),
        attention_bytes=spec.attention_side_bytes,
        ffn_bytes=sum(ffn_bytes_by_layer(spec, topology)),
        residency=ffn_pool.residency(model.index),
    )
