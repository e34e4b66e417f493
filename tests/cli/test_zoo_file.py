from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from crosspool.cli.settings import ModelEntry
from crosspool.cli.zoo_file import read_zoo_file
from crosspool.core.config import SchedulerConfig, WeightsMemory
from crosspool.core.errors import ConfigError
from crosspool.core.topology import Sharding
from crosspool.server.config import LimitsConfig, ServerConfig, SupervisionConfig

pytestmark = pytest.mark.unit

WHOLE = """
[[models]]
path = "big"

[[models]]
name = "small"
path = "org/small"
dtype = "float32"
weights_dtype = "int8"
pinned = true
ttft_target_ms = 500
tbt_target_ms = 12.5
kv_floor_bytes = "256MiB"
kv_cap_bytes = "1GiB"

[pools]
kv_pool_bytes = "2GiB"
weights_pool_bytes = 1000000
kv_pool_fraction = 0.25
weights_memory = "huge"
prefix_cache = false
spill_bytes = "3MiB"

[devices]
kv_devices = ["cpu:0"]
weights_devices = ["cpu:1", "cpu:2"]
ffn_sharding = "tensor"
threads = 1

[scheduler]
chunk_quantum = 32
chunk_layer_cost_ms = 2.5

[server]
host = "0.0.0.0"
port = 9000
api_key = "secret"
drain_timeout = 5

[server.limits]
max_body_bytes = "1MiB"
total_timeout = 60

[server.supervision]
hang_timeout = 10
dead_after = 3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "zoo.toml"
    path.write_text(text)
    return path


def test_every_table_is_read(tmp_path: Path) -> None:
    settings = read_zoo_file(write(tmp_path, WHOLE))
    assert settings.models == (
        ModelEntry(place="big", base=tmp_path),
        ModelEntry(
            place="org/small",
            base=tmp_path,
            name="small",
            dtype="float32",
            weights_dtype="int8",
            pinned=True,
            ttft_target=500_000_000,
            tbt_target=12_500_000,
            kv_floor_bytes=2**28,
            kv_cap_bytes=2**30,
        ),
    )
    assert settings.pools == {
        "kv_pool_bytes": 2 * 2**30,
        "weights_pool_bytes": 1_000_000,
        "kv_pool_fraction": 0.25,
        "weights_memory": WeightsMemory.HUGE,
        "prefix_cache": False,
        "spill_bytes": 3 << 20,
    }
    assert settings.devices == {
        "kv_devices": ("cpu:0",),
        "weights_devices": ("cpu:1", "cpu:2"),
        "sharding": Sharding.TENSOR,
        "threads": 1,
    }
    assert settings.scheduler == {"chunk_quantum": 32, "chunk_layer_cost": 2_500_000}
    server = settings.server_config()
    assert (server.host, server.port, server.api_key, server.drain_timeout) == ("0.0.0.0", 9000, "secret", 5)
    assert (server.limits.max_body_bytes, server.limits.total_timeout) == (2**20, 60)
    assert (server.supervision.hang_timeout, server.supervision.dead_after) == (10, 3)


def test_relative_folders_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoos" / "big").mkdir(parents=True)
    path = write(tmp_path / "zoos", '[[models]]\npath = "big"\n')
    monkeypatch.chdir(tmp_path)
    config = read_zoo_file(path.relative_to(tmp_path)).engine_config("auto")
    assert [(model.name, model.path) for model in config.models] == [("big", str(tmp_path / "zoos" / "big"))]


def test_a_models_share_of_the_kv_pool_comes_to_its_config(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    text = '[[models]]\npath = "big"\nkv_floor_bytes = 4096\nkv_cap_bytes = "8KiB"\n'
    (model,) = read_zoo_file(write(tmp_path, text)).engine_config("auto").models
    assert (model.kv_floor_bytes, model.kv_cap_bytes) == (4096, 8192)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pools]\nkv_pool = 1", "unknown key 'kv_pool' in [pools]; there are device_bytes, kv_pool_bytes"),
        ("[[models]]\npath = 'a'\nfolder = 'a'", "unknown key 'folder' in [models]"),
        ("[server.limits]\nx = 1", "unknown key 'x' in [server.limits]"),
        ("[scheduler]\nttft_target = 1", "unknown key 'ttft_target' in [scheduler]"),
        ("[pool]\n", "unknown table or key 'pool'; there are models, pools"),
        ("[[models]]\nname = 'a'", "[models] lacks the key 'path'"),
        ("[models]\npath = 'a'", "models must be tables, each headed [[models]]"),
        ("pools = 3", "pools must be a table, headed [pools]"),
        ("[server]\nlimits = 3", "limits must be a table, headed [server.limits]"),
        ("[pools]\nkv_pool_bytes = '2XB'", "'kv_pool_bytes' in [pools]: '2XB' is not a number of bytes"),
        ("[pools]\nkv_pool_bytes = 1.5", "'kv_pool_bytes' in [pools] must be a number of bytes"),
        ("[server]\nport = '80'", "'port' in [server] must be an integer, not '80'"),
        ("[server]\nport = true", "'port' in [server] must be an integer, not True"),
        ("[server]\nhost = 1", "'host' in [server] must be text, not 1"),
        ("[server]\ndrain_timeout = 'x'", "'drain_timeout' in [server] must be a number, not 'x'"),
        ("[[models]]\npath = 'a'\npinned = 1", "'pinned' in [models] must be true or false, not 1"),
        ("[devices]\nkv_devices = 'cpu:0'", "'kv_devices' in [devices] must be a list of texts"),
        ("[devices]\nffn_sharding = 'x'", "'ffn_sharding' in [devices] must be 'layer' or 'tensor'"),
        ("[pools]\nweights_memory = 'x'", "'weights_memory' in [pools] must be 'mapped' or 'huge', not 'x'"),
        ("[pools", "is not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_file_table_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_zoo_file(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        read_zoo_file(tmp_path / "none.toml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "zoo.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"zoo\.toml is not valid TOML"):
        read_zoo_file(tmp_path / "zoo.toml")


def test_the_example_in_the_documentation_has_every_key_with_its_default(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    settings = read_zoo_file(write(tmp_path, re.sub(r"^# (?=\w+ =)", "", example, flags=re.MULTILINE)))
    assert SchedulerConfig(**settings.scheduler) == SchedulerConfig()
    assert LimitsConfig(**settings.limits) == LimitsConfig()
    assert SupervisionConfig(**settings.supervision) == SupervisionConfig()
    assert replace(settings.server_config(), api_key=None) == ServerConfig()
    tables = [
        (SchedulerConfig, settings.scheduler),
        (LimitsConfig, settings.limits),
        (SupervisionConfig, settings.supervision),
    ]
    for config, given in tables:
        assert set(given) == {entry.name for entry in fields(config)}
    assert set(settings.devices) == {"kv_devices", "weights_devices", "sharding", "threads", "kernels"}
