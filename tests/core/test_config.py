"""Configurations that cannot work are refused when they are made."""

from __future__ import annotations

import pytest

from crosspool.core.config import (
    EngineConfig,
    Kernels,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    WeightsMemory,
)
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.unit

A = ModelConfig("a", "/models/a")


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model"):
        EngineConfig(())
    with pytest.raises(ConfigError, match="given twice: a"):
        EngineConfig((A, A))
    with pytest.raises(ConfigError, match="kv_devices is empty"):
        EngineConfig((A,), kv_devices=())
    with pytest.raises(ConfigError, match="weights_devices names a device twice: cpu:1, cpu:1"):
        EngineConfig((A,), weights_devices=("cpu:1", "cpu:1"))
    with pytest.raises(ConfigError, match="kv_pool_bytes must be above 0"):
        PoolConfig(kv_pool_bytes=0)
    with pytest.raises(ConfigError, match="decode_steps"):
        SchedulerConfig(decode_steps=0)
    with pytest.raises(ConfigError, match="decode_steps must be at most 4096, not 4097"):
        SchedulerConfig(decode_steps=4097)
    with pytest.raises(ConfigError, match="max_chunk_tokens 32 is below chunk_quantum 64"):
        SchedulerConfig(max_chunk_tokens=32)
    with pytest.raises(ConfigError, match="dtype"):
        ModelConfig("a", "/models/a", dtype="int3")
    with pytest.raises(ConfigError, match="without spaces"):
        ModelConfig("a b", "/models/a")
    with pytest.raises(ConfigError, match="model a: weights_dtype must be auto, int8 or float8, not 'int4'"):
        ModelConfig("a", "/models/a", weights_dtype="int4")


def test_plain_torch_has_neither_int8_nor_copies() -> None:
    int8 = ModelConfig("b", "/models/b", weights_dtype="int8")
    with pytest.raises(ConfigError, match="model b: weights_dtype int8 needs the compiled kernels"):
        EngineConfig((A, int8), kernels=Kernels.REFERENCE)
    huge = PoolConfig(weights_memory=WeightsMemory.HUGE)
    with pytest.raises(ConfigError, match="weights_memory huge needs the compiled kernels"):
        EngineConfig((A,), huge, kernels=Kernels.REFERENCE)
    assert EngineConfig((A, int8), huge).kernels is Kernels.COMPILED


def test_teams_follow_from_the_devices() -> None:
    config = EngineConfig((A,), kv_devices=("cpu:0", "cpu:1"), weights_devices=("cpu:1", "cpu:2"))
    assert config.topology.teams == ("cpu:0", "cpu:1", "cpu:2")
    assert not config.topology.one_device
    assert EngineConfig((A,)).topology.one_device
