from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from crosspool.cli.app import app
from crosspool.core.config import EngineConfig, WeightsMemory
from crosspool.core.errors import ConfigError
from crosspool.core.ids import ModelIndex
from crosspool.core.info import EngineInfo, LoadProgress, ModelInfo, Residency
from crosspool.core.topology import Sharding
from crosspool.demo import build
from crosspool.demo.zoo import Weights, Zoo, ZooModel
from crosspool.server.config import ServerConfig

pytestmark = pytest.mark.unit

GIB = 1 << 30
INFO = EngineInfo(
    models=(
        ModelInfo(
            name="good",
            index=ModelIndex(0),
            path="/models/good",
            architecture="MixtralForCausalLM",
            dtype="bfloat16",
            weights_dtype="int8",
            max_context=8192,
            max_pool_tokens=4000,
            kv_bytes_per_token=23040,
            attention_bytes=100 * 2**20,
            ffn_bytes=3 * GIB,
            residency=Residency.RESIDENT,
        ),
        ModelInfo(name="bad", index=ModelIndex(1), path="/models/bad", error="config.json is missing"),
    ),
    kv_devices=("cpu:0",),
    weights_devices=("cpu:1",),
    page_bytes=65536,
    kv_pages=16384,
    kv_pool_bytes=GIB,
    weights_pool_bytes=4 * GIB,
    weights_used_bytes=3 * GIB,
)


class FakeServer:
    """Stands in for crosspool.server.run: notes its configs, loads two models, gets ready, ends."""

    engine: EngineConfig
    server: ServerConfig
    error: Exception | None = None

    def serve(self, engine: EngineConfig, server: ServerConfig, progress: Any, on_ready: Any) -> int:
        self.engine, self.server = engine, server
        if self.error is not None:
            raise self.error
        progress(LoadProgress("good", 0, 200))
        progress(LoadProgress("good", 200, 200))
        progress(LoadProgress("bad", 0, 0, "config.json is missing"))
        on_ready(INFO, f"http://127.0.0.1:{server.port}")
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeServer:
    server = FakeServer()
    module = ModuleType("crosspool.server.run")
    module.serve = server.serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "crosspool.server.run", module)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return server


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def test_every_option_reaches_the_configs(fake: FakeServer, tmp_path: Path) -> None:
    options = (
        "a second=b --dtype float32 --weights-dtype int8 --weights-memory huge "
        "--kv-pool-bytes 2GiB --weights-pool-bytes 500MB --page-bytes 65536 --no-prefix-cache "
        "--spill-bytes 0 --kv-devices cpu:0 --weights-devices cpu:1,cpu:2 --ffn-sharding tensor --threads 1 "
        "--ttft-target-ms 700 --tbt-target-ms 12.5 --host 0.0.0.0 --port 9000 --api-key secret"
    )
    result = run(*options.split())
    assert result.exit_code == 0, result.output
    engine, server = fake.engine, fake.server
    assert [(model.name, model.path, model.dtype, model.weights_dtype) for model in engine.models] == [
        ("a", str(tmp_path / "a"), "float32", "int8"),
        ("second", str(tmp_path / "b"), "float32", "int8"),
    ]
    assert engine.pools.weights_memory is WeightsMemory.HUGE
    assert not engine.pools.prefix_cache and engine.pools.spill_bytes == 0
    assert engine.pools.kv_pool_bytes == 2 * GIB
    assert engine.pools.weights_pool_bytes == 500_000_000
    assert engine.pools.page_bytes == 65536
    assert engine.kv_devices == ("cpu:0",)
    assert engine.weights_devices == ("cpu:1", "cpu:2")
    assert (engine.sharding, engine.threads) == (Sharding.TENSOR, 1)
    assert (engine.scheduler.ttft_target, engine.scheduler.tbt_target) == (700_000_000, 12_500_000)
    assert (server.host, server.port, server.api_key) == ("0.0.0.0", 9000, "secret")


def test_what_is_not_given_is_as_the_configs_have_it(fake: FakeServer, tmp_path: Path) -> None:
    assert run("a").exit_code == 0
    assert fake.engine == EngineConfig(models=fake.engine.models)
    assert fake.engine.models[0].dtype == "auto"
    assert fake.server == ServerConfig()


def test_options_go_before_the_zoo_file_and_models_add_up(fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "zoo.toml").write_text(
        '[[models]]\npath = "a"\n[pools]\nkv_pool_bytes = "1GiB"\n[server]\nport = 9000\nhost = "::1"\n'
    )
    assert run("b", "--config", "zoo.toml", "--port", "1234", "--kv-pool-fraction", "0.3").exit_code == 0
    assert [model.name for model in fake.engine.models] == ["a", "b"]
    assert (fake.server.host, fake.server.port) == ("::1", 1234)
    assert (fake.engine.pools.kv_pool_bytes, fake.engine.pools.kv_pool_fraction) == (None, 0.3)


def test_the_demo_zoo_is_built_and_served(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tuple(ZooModel(n, "X", Weights.RANDOM, 1, "here", "MIT", {}) for n in ("a", "b"))
    asked: list[Path] = []

    def build_zoo(path: Path, **_: object) -> Zoo:
        asked.append(path)
        return Zoo(path, models)

    monkeypatch.setattr(build, "build_zoo", build_zoo)
    assert run("--demo", "--demo-dir", str(tmp_path)).exit_code == 0
    assert asked == [tmp_path]
    assert [(model.name, model.path) for model in fake.engine.models] == [
        ("a", str(tmp_path / "a")),
        ("b", str(tmp_path / "b")),
    ]


def test_the_summary_names_both_pools_and_what_to_try(fake: FakeServer) -> None:
    result = run("a")
    assert "Loaded good, 200 B" in result.stderr
    assert result.stderr.count("bad will not be served: config.json is missing") == 1
    out = result.stdout
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["good"])
    assert " ".join(row) == ("good Mixtral bfloat16, int8 100 MiB 3.00 GiB resident 22.5 KiB 4,000 tokens")
    assert "16,384 of 64.0 KiB" in out
    assert ["bad", "failed"] in [line.split() for line in out.splitlines()]
    assert 'crosspool chat good "What is the capital of France?"\n' in out
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in out
    body = json.loads(out.split("-d '")[1].split("'")[0])
    assert (body["model"], body["messages"][0]["role"]) == ("good", "user")


def test_what_to_try_has_the_port_and_a_place_for_the_key_but_not_the_key(fake: FakeServer) -> None:
    out = run("a", "--port", "9000", "--api-key", "hunter2").stdout
    assert "--url http://127.0.0.1:9000 --api-key YOUR_KEY" in out
    assert "Authorization: Bearer YOUR_KEY" in out
    assert "hunter2" not in out


def test_json_is_one_line_with_everything(fake: FakeServer) -> None:
    result = run("a", "--json")
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert summary["url"] == "http://127.0.0.1:8000"
    assert [model["name"] for model in summary["models"]] == ["good", "bad"]
    assert (summary["kv_pages"], summary["weights_used_bytes"]) == (16384, 3 * GIB)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model to serve: give a MODEL, --config or --demo"),
        (["none"], "'none' is no hub id"),
        (["a", "a"], "model names must differ; given twice: a"),
        (["a", "--kv-pool-bytes", "2XB"], "'2XB' is not a number of bytes"),
        (["a", "--kv-pool-bytes", "0"], "kv_pool_bytes must be above 0"),
        (["a", "--kv-pool-bytes", "1GiB", "--kv-pool-fraction", "0.5"], "not both"),
        (["a", "--dtype", "int4"], "dtype must be auto, float32, bfloat16 or float16, not 'int4'"),
        (["a", "--weights-dtype", "int4"], "model a: weights_dtype must be auto, int8 or float8, not 'int4'"),
        (["a", "--weights-memory", "disk"], "'disk' is not one of"),
        (
            ["a", "--weights-dtype", "int8", "--kernels", "reference"],
            "model a: weights_dtype int8 needs the compiled kernels",
        ),
        (
            ["a", "--weights-memory", "huge", "--kernels", "reference"],
            "weights_memory huge needs the compiled kernels",
        ),
        (["a", "--ffn-sharding", "rows"], "'rows' is not one of"),
        (["a", "--kv-devices", "cpu:0,cpu:0"], "names a device twice"),
        (["a", "--port", "70000"], "port must be within 0 and 65535"),
        (["a", "--config", "none.toml"], "cannot read none.toml"),
    ],
)
def test_a_mistake_ends_with_status_2_before_anything_is_served(
    fake: FakeServer, arguments: list[str], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not hasattr(fake, "engine")


def test_the_servers_own_errors_are_passed_on(fake: FakeServer) -> None:
    fake.error = ConfigError("port 8000 of 127.0.0.1 is in use by another process")
    result = run("a")
    assert (result.exit_code, result.stderr) == (2, f"crosspool: {fake.error}\n")
