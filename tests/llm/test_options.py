"""Keyword arguments to an EngineConfig."""

import pytest

from crosspool.core.config import ModelConfig, SchedulerConfig, WeightsMemory
from crosspool.core.errors import ConfigError
from crosspool.core.topology import Sharding
from crosspool.llm.options import engine_config, model_configs, split_name

pytestmark = pytest.mark.unit


def test_models_as_a_mapping(tmp_path):
    configs = model_configs({"a": tmp_path, "b": "x/y"}, "float32", "int8")
    assert configs == (
        ModelConfig("a", str(tmp_path), "float32", "int8"),
        ModelConfig("b", "x/y", "float32", "int8"),
    )


@pytest.mark.parametrize(
    ("argument", "name", "place"),
    [
        ("models/a", None, "models/a"),
        ("a=models/a", "a", "models/a"),
        ("a=b=c", "a", "b=c"),
        ("=x", "", "x"),
    ],
)
def test_a_name_is_before_the_first_equals_sign(argument, name, place):
    assert split_name(argument) == (name, place)


def test_a_folder_may_have_an_equals_sign(tmp_path, monkeypatch):
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_name("a=b") == (None, "a=b")


def test_models_as_a_list(tmp_path, monkeypatch):
    folder = tmp_path / "with=sign"
    folder.mkdir()
    own = ModelConfig("own", "o", "bfloat16", pinned=True)
    configs = model_configs(["a=x/y=z", "models/b", str(folder), tmp_path / "c", own], "float32", "int8")
    assert [(config.name, config.path) for config in configs] == [
        ("a", "x/y=z"),
        ("b", "models/b"),
        ("with=sign", str(folder)),
        ("c", str(tmp_path / "c")),
        ("own", "o"),
    ]
    assert [config.dtype for config in configs] == ["float32"] * 4 + ["bfloat16"]
    assert [config.weights_dtype for config in configs] == ["int8"] * 4 + ["auto"]
    monkeypatch.chdir(folder)
    assert model_configs(["."])[0].name == "with=sign"


def test_every_option_arrives():
    scheduler = SchedulerConfig(decode_steps=2)
    config = engine_config(
        {"a": "x"},
        kv_pool_bytes=1000,
        weights_pool_bytes=2000,
        page_bytes=100,
        weights_dtype="int8",
        weights_memory="huge",
        prefix_cache=False,
        spill_bytes=300,
        kv_devices=["cpu:0", "cpu:1"],
        weights_devices=["cpu:2"],
        sharding="tensor",
        threads=3,
        scheduler=scheduler,
    )
    assert (config.pools.kv_pool_bytes, config.pools.weights_pool_bytes, config.pools.page_bytes) == (
        1000,
        2000,
        100,
    )
    assert (config.models[0].weights_dtype, config.pools.weights_memory) == ("int8", WeightsMemory.HUGE)
    assert not config.pools.prefix_cache and config.pools.spill_bytes == 300
    assert (config.kv_devices, config.weights_devices) == (("cpu:0", "cpu:1"), ("cpu:2",))
    assert (config.sharding, config.threads, config.scheduler) == (Sharding.TENSOR, 3, scheduler)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ({}, {}, "no model"),
        ("a", {}, "mapping or a list"),
        (["x/a", "y/a"], {}, "given twice: a"),
        (["=x"], {}, "name must be"),
        ({"a": "x"}, {"dtype": "int8"}, "dtype must be"),
        (
            {"a": "x"},
            {"weights_dtype": "int4"},
            "model a: weights_dtype must be auto, int8 or float8, not 'int4'",
        ),
        ({"a": "x"}, {"weights_memory": "disk"}, "weights_memory must be mapped or huge, not 'disk'"),
        ({"a": "x"}, {"sharding": "row"}, "sharding must be layer or tensor or model, not 'row'"),
        ({"a": "x"}, {"threads": 0}, "threads"),
        ({"a": "x"}, {"spill_bytes": -1}, "spill_bytes must not be below 0: -1"),
        ({"a": "x"}, {"kv_devices": []}, "kv_devices is empty"),
    ],
)
def test_what_cannot_work(models, options, said):
    with pytest.raises(ConfigError, match=said):
        engine_config(models, **options)
