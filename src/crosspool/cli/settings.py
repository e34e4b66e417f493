"""Settings from several sources, put together into the configs of the engine and the server."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosspool.cli.checkpoints import find_checkpoint
from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.ids import Nanoseconds
from crosspool.server.config import LimitsConfig, ServerConfig, SupervisionConfig


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model as an operator names it. ``place`` is a folder relative to ``base``, or a hub id."""

    place: str
    base: Path
    name: str | None = None
    dtype: str | None = None
    weights_dtype: str | None = None
    pinned: bool = False
    ttft_target: Nanoseconds | None = None
    tbt_target: Nanoseconds | None = None
    kv_floor_bytes: int = 0
    kv_cap_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What one source says: field names and values of each config, none for what it leaves open."""

    models: tuple[ModelEntry, ...] = ()
    pools: dict[str, Any] = field(default_factory=dict)
    devices: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    supervision: dict[str, Any] = field(default_factory=dict)

    def over(self, base: Settings) -> Settings:
        """Both sources' models, and for every other setting this source's word before ``base``'s."""
        return Settings(
            models=base.models + self.models,
            pools=base.pools | self.pools,
            devices=base.devices | self.devices,
            scheduler=base.scheduler | self.scheduler,
            server=base.server | self.server,
            limits=base.limits | self.limits,
            supervision=base.supervision | self.supervision,
        )

    def engine_config(self, default_dtype: str, default_weights_dtype: str = "auto") -> EngineConfig:
        """Check the settings, then find all models, fetching those of the hub.

        Both dtypes are for models that name none. Raises ConfigError for what cannot work.
        """
        pools, scheduler = PoolConfig(**self.pools), SchedulerConfig(**self.scheduler)
        models = tuple(_model_config(entry, default_dtype, default_weights_dtype) for entry in self.models)
        return EngineConfig(models, pools, scheduler, **self.devices)

    def server_config(self) -> ServerConfig:
        limits, supervision = LimitsConfig(**self.limits), SupervisionConfig(**self.supervision)
        return replace(ServerConfig(**self.server), limits=limits, supervision=supervision)


def _model_config(entry: ModelEntry, default_dtype: str, default_weights_dtype: str) -> ModelConfig:
    name, folder = find_checkpoint(entry.place, entry.base)
    return ModelConfig(
        name=name if entry.name is None else entry.name,
        path=str(folder),
        dtype=entry.dtype or default_dtype,
        weights_dtype=entry.weights_dtype or default_weights_dtype,
        pinned=entry.pinned,
        ttft_target=entry.ttft_target,
        tbt_target=entry.tbt_target,
        kv_floor_bytes=entry.kv_floor_bytes,
        kv_cap_bytes=entry.kv_cap_bytes,
    )
