"""Each model's share of the KV pool in whole pages, from what the config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from crosspool.build.pool_plan import PoolPlan
from crosspool.core.config import EngineConfig, Mode, ModelConfig
from crosspool.core.errors import ConfigError
from crosspool.core.ids import ModelIndex
from crosspool.pools.kv import KvPool
from crosspool.pools.quotas import Quota


def quotas_of(config: EngineConfig, models: Iterable[ModelIndex], plan: PoolPlan) -> dict[ModelIndex, Quota]:
    """Floors and caps of these models. Raises ConfigError for floors that are more than there is."""
    quotas: dict[ModelIndex, Quota] = {}
    for together, pages in _sharing(models, plan):
        own = {index: config.models[index] for index in together}
        part = _fixed(own, pages, plan) if config.mode is Mode.STATIC else _asked(own, plan)
        floors = sum(quota.floor for quota in part.values())
        if floors > pages:
            raise ConfigError(
                f"kv_floor_bytes of {', '.join(model.name for model in own.values())} together are "
                f"{floors * plan.page_bytes:,}, but they share {pages * plan.page_bytes:,} bytes of KV"
            )
        quotas |= part
    return quotas


def check_rooms(config: EngineConfig, pool: KvPool, page_bytes: int) -> None:
    """Every model can hold the shortest sequence at least. Raises ConfigError."""
    for index in pool.models:
        if pool.most_tokens(index) == 0:
            room, smallest = pool.quotas(index).most(index), len(pool.layout(index).groups)
            raise ConfigError(
                f"model {config.models[index].name}: its kv_cap_bytes and the kv_floor_bytes of other models "
                f"leave it {room * page_bytes:,} bytes of the KV pool on all devices; the shortest sequence "
                f"needs {smallest * page_bytes:,}"
            )


def _sharing(models: Iterable[ModelIndex], plan: PoolPlan) -> list[tuple[list[ModelIndex], int]]:
    """Models that share devices, and how many pages these have."""
    homes: dict[int | None, list[ModelIndex]] = {}
    for model in models:
        homes.setdefault(plan.homes.get(model), []).append(model)
    devices = plan.places.devices
    return [
        (together, plan.places.total if home is None else len(plan.places.pages_of(devices[home])))
        for home, together in homes.items()
    ]


def _asked(models: Mapping[ModelIndex, ModelConfig], plan: PoolPlan) -> dict[ModelIndex, Quota]:
    return {
        index: Quota(model.kv_floor_bytes // plan.page_bytes, _pages(model.kv_cap_bytes, plan))
        for index, model in models.items()
    }


def _fixed(models: Mapping[ModelIndex, ModelConfig], pages: int, plan: PoolPlan) -> dict[ModelIndex, Quota]:
    """Floors that are caps: what a model asks for, or an equal part of what the others leave."""
    shares = {
        index: _pages(model.kv_cap_bytes or model.kv_floor_bytes or None, plan)
        for index, model in models.items()
    }
    left = pages - sum(share for share in shares.values() if share is not None)
    equal = max(0, left) // max(1, sum(share is None for share in shares.values()))
    fixed = {index: equal if share is None else share for index, share in shares.items()}
    return {index: Quota(share, share) for index, share in fixed.items()}


def _pages(size: int | None, plan: PoolPlan) -> int | None:
    return None if size is None else size // plan.page_bytes
