from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosspool.core.errors import ConfigError
from crosspool.demo.zoo import Weights, Zoo, ZooModel, default_zoo_path, is_zoo, open_zoo, write_index

pytestmark = pytest.mark.unit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = ZooModel("tiny", "LlamaForCausalLM", Weights.RANDOM, 3, "nowhere", "MIT", {"a": 2, "b": 3})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "a").write_bytes(b"12")
    (tmp_path / "tiny" / "b").write_bytes(b"123")
    write_index(tmp_path, (model,))
    return tmp_path


def opened(path: Path) -> Zoo:
    zoo = open_zoo(path)
    assert zoo is not None
    return zoo


def test_a_finished_zoo_is_opened(path: Path) -> None:
    zoo = opened(path)
    (model,) = zoo.models
    assert (model.name, model.weights, model.files, model.bytes) == ("tiny", "random", {"a": 2, "b": 3}, 5)
    assert zoo.folder(model) == path / "tiny"
    assert zoo.bytes == 5


def test_the_index_says_folder_and_bytes(path: Path) -> None:
    (entry,) = json.loads((path / "zoo.json").read_text())["models"]
    assert (entry["folder"], entry["bytes"], entry["weights"]) == ("tiny", 5, "random")


def test_no_zoo(tmp_path: Path) -> None:
    assert open_zoo(tmp_path / "none") is None
    assert not is_zoo(tmp_path)


def test_a_missing_or_shortened_file_makes_the_zoo_unfinished(path: Path) -> None:
    (path / "tiny" / "b").write_bytes(b"12")
    assert open_zoo(path) is None
    (path / "tiny" / "b").unlink()
    assert open_zoo(path) is None
    assert is_zoo(path)


def test_a_zoo_of_another_version_does_not_count(path: Path) -> None:
    index = json.loads((path / "zoo.json").read_text())
    (path / "zoo.json").write_text(json.dumps({**index, "version": index["version"] + 1}))
    assert open_zoo(path) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"version": 1, "models": [{"weights": "random"}]}']
)
def test_an_index_that_cannot_be_read_is_named(path: Path, text: str) -> None:
    (path / "zoo.json").write_text(text)
    with pytest.raises(ConfigError, match=r"zoo\.json is not a zoo's index"):
        open_zoo(path)


def test_the_default_place_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_zoo_path() == tmp_path / ".cache" / "crosspool" / "zoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_zoo_path() == tmp_path / ".cache" / "crosspool" / "zoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_zoo_path() == Path("/elsewhere/crosspool/zoo")
