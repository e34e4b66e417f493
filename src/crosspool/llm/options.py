"""The keyword arguments of LLM and AsyncLLM, turned into an EngineConfig."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

from crosspool.core.config import (
    EngineConfig,
    Kernels,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    WeightsMemory,
)
from crosspool.core.errors import ConfigError
from crosspool.core.topology import Sharding

Folder = str | PathLike[str]
Models = Mapping[str, Folder] | Sequence[Folder | ModelConfig]


def engine_config(
    models: Models,
    *,
    kv_pool_bytes: int | None = None,
    weights_pool_bytes: int | None = None,
    page_bytes: int | None = None,
    dtype: str = "auto",
    weights_dtype: str = "auto",
    weights_memory: WeightsMemory | str = WeightsMemory.MAPPED,
    prefix_cache: bool = True,
    spill_bytes: int | None = None,
    kv_devices: Sequence[str] = ("cpu:0",),
    weights_devices: Sequence[str] = ("cpu:0",),
    sharding: Sharding | str = Sharding.LAYER,
    threads: int | None = None,
    kernels: Kernels | str = Kernels.COMPILED,
    scheduler: SchedulerConfig | None = None,
) -> EngineConfig:
    """The configuration of an engine; see EngineConfig for what the values mean. Raises ConfigError."""
    if sharding not in tuple(Sharding):
        raise ConfigError(f"sharding must be {' or '.join(Sharding)}, not {sharding!r}")
    if kernels not in tuple(Kernels):
        raise ConfigError(f"kernels must be {' or '.join(Kernels)}, not {kernels!r}")
    if weights_memory not in tuple(WeightsMemory):
        raise ConfigError(f"weights_memory must be {' or '.join(WeightsMemory)}, not {weights_memory!r}")
    return EngineConfig(
        models=model_configs(models, dtype, weights_dtype),
        pools=PoolConfig(
            kv_pool_bytes=kv_pool_bytes,
            weights_pool_bytes=weights_pool_bytes,
            page_bytes=page_bytes,
            weights_memory=WeightsMemory(weights_memory),
            prefix_cache=prefix_cache,
            spill_bytes=spill_bytes,
        ),
        scheduler=scheduler or SchedulerConfig(),
        kv_devices=tuple(kv_devices),
        weights_devices=tuple(weights_devices),
        sharding=Sharding(sharding),
        threads=threads,
        kernels=Kernels(kernels),
    )


def model_configs(
    models: Models, dtype: str = "auto", weights_dtype: str = "auto"
) -> tuple[ModelConfig, ...]:
    """Models given as {name: folder}, or as a list of "name=folder", folders (whose last part is the name)
    and ModelConfigs, which keep their own dtypes. Raises ConfigError."""
    if isinstance(models, str | PathLike):
        raise ConfigError(f"models must be a mapping or a list, not {models!r}")
    if isinstance(models, Mapping):
        named = [(name, fspath(folder)) for name, folder in models.items()]
        return tuple(ModelConfig(name, folder, dtype, weights_dtype) for name, folder in named)
    return tuple(
        model if isinstance(model, ModelConfig) else ModelConfig(*_named(model), dtype, weights_dtype)
        for model in models
    )


def split_name(argument: str) -> tuple[str | None, str]:
    """``name=place`` as (name, place). The name is None if there is none, or if all of it is a folder."""
    name, equals, place = argument.partition("=")
    return (name, place) if equals and not Path(argument).is_dir() else (None, argument)


def _named(model: Folder) -> tuple[str, str]:
    name, folder = split_name(fspath(model))
    return (Path(folder).resolve().name if name is None else name), folder
