"""Configurations that cannot work are refused when they are made."""

from __future__ import annotations

import pytest

from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
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
    with pytest.raises(ConfigError, match="max_chunk_tokens 32 is below chunk_quantum 64"):
        SchedulerConfig(max_chunk_tokens=32)
    with pytest.raises(ConfigError, match="dtype"):
        ModelConfig("a", "/models/a", dtype="int3")
    with pytest.raises(ConfigError, match="without spaces"):
        ModelConfig("a b", "/models/a")


def test_teams_follow_from_the_devices() -> None:
    config = EngineConfig((A,), kv_devices=("cpu:0", "cpu:1"), weights_devices=("cpu:1", "cpu:2"))
    assert config.topology.teams == ("cpu:0", "cpu:1", "cpu:2")
    assert not config.topology.one_device
    assert EngineConfig((A,)).topology.one_device
