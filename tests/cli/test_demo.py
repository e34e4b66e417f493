from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosspool.cli.app import app
from crosspool.core.errors import ConfigError
from crosspool.demo import build
from crosspool.demo.zoo import Weights, Zoo, ZooModel, write_index

pytestmark = pytest.mark.unit

MODEL = ZooModel("tiny", "LlamaForCausalLM", Weights.RANDOM, 5_000_000, "here", "MIT", {"a": 3})


def make_zoo(path: Path, **_: object) -> Zoo:
    (path / "tiny").mkdir(parents=True)
    (path / "tiny" / "a").write_bytes(b"123")
    write_index(path, (MODEL,))
    return Zoo(path, (MODEL,))


def test_build_shows_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_zoo", make_zoo)
    result = CliRunner().invoke(app, ["demo", "build", "--dir", str(tmp_path / "zoo")])
    assert result.exit_code == 0, result.output
    for part in (str(tmp_path / "zoo"), "tiny", "LlamaForCausalLM", "5M", "random", "3 B"):
        assert part in result.stdout


def test_build_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_zoo", make_zoo)
    result = CliRunner().invoke(app, ["demo", "build", "--dir", str(tmp_path / "zoo"), "--json"])
    described = json.loads(result.stdout)
    assert (described["path"], described["bytes"]) == (str(tmp_path / "zoo"), 3)
    assert described["models"][0]["folder"] == str(tmp_path / "zoo" / "tiny")
    assert described["models"][0]["weights"] == "random"


def test_the_wheel_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_zoo(path: Path, *, wheel: Path | None, **_: object) -> Zoo:
        raise ConfigError(f"{wheel} is not the expected file")

    monkeypatch.setattr(build, "build_zoo", build_zoo)
    result = CliRunner().invoke(app, ["demo", "build", "--wheel", "x.whl"])
    assert (result.exit_code, result.stderr) == (2, "crosspool: x.whl is not the expected file\n")


def test_path_prints_the_folder_of_a_built_zoo(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    result = CliRunner().invoke(app, ["demo", "path", "--dir", str(tmp_path / "zoo")])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'zoo'}\n")


def test_path_of_no_zoo_says_how_to_build_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "path", "--dir", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "crosspool demo build" in result.stderr


def test_the_default_place_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_zoo(tmp_path / "crosspool" / "zoo")
    result = CliRunner().invoke(app, ["demo", "path"])
    assert result.stdout == f"{tmp_path / 'crosspool' / 'zoo'}\n"
