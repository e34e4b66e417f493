from __future__ import annotations

from pathlib import Path

import pytest

from crosspool.cli.settings import ModelEntry, Settings
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.unit


def entry(base: Path, place: str, **fields: object) -> ModelEntry:
    (base / place).mkdir(exist_ok=True)
    return ModelEntry(place, base, **fields)


def test_the_source_that_is_over_the_other_goes_first_and_models_add_up(tmp_path: Path) -> None:
    file = Settings(
        models=(entry(tmp_path, "a"),),
        pools={"kv_pool_bytes": 100, "page_bytes": 4096},
        scheduler={"decode_steps": 2},
        server={"host": "0.0.0.0", "port": 9000},
    )
    given = Settings(models=(entry(tmp_path, "b"),), pools={"kv_pool_bytes": 200}, server={"port": 1234})
    both = given.over(file)
    engine, server = both.engine_config("auto"), both.server_config()
    assert [model.name for model in engine.models] == ["a", "b"]
    assert (engine.pools.kv_pool_bytes, engine.pools.page_bytes) == (200, 4096)
    assert engine.scheduler.decode_steps == 2
    assert (server.host, server.port) == ("0.0.0.0", 1234)


def test_a_model_keeps_its_own_name_and_dtypes(tmp_path: Path) -> None:
    settings = Settings(
        models=(
            entry(
                tmp_path, "a", name="first", dtype="float32", weights_dtype="auto", pinned=True, tbt_target=7
            ),
            entry(tmp_path, "b"),
        )
    )
    first, second = settings.engine_config("bfloat16", "int8").models
    assert (first.name, first.dtype, first.pinned, first.tbt_target) == ("first", "float32", True, 7)
    assert (second.name, second.dtype, second.pinned, second.tbt_target) == ("b", "bfloat16", False, None)
    assert (first.weights_dtype, second.weights_dtype) == ("auto", "int8")


def test_settings_are_checked_before_models_are_looked_for(tmp_path: Path) -> None:
    settings = Settings(models=(ModelEntry("org/model", tmp_path),), pools={"kv_pool_bytes": -1})
    with pytest.raises(ConfigError, match="kv_pool_bytes must be above 0"):
        settings.engine_config("auto")


def test_an_empty_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model's name must be"):
        Settings(models=(entry(tmp_path, "a", name=""),)).engine_config("auto")
