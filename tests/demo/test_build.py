from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crosspool.core.errors import ConfigError
from crosspool.demo import build
from crosspool.demo.build import build_zoo
from crosspool.demo.recipes import Progress
from crosspool.demo.zoo import Weights, ZooModel, open_zoo, write_index

pytestmark = pytest.mark.unit


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the making of models by one small file; lists the working folders of all builds."""
    made: list[Path] = []

    def make_models(work: Path, wheel: Path | None, progress: Progress) -> None:
        made.append(work)
        time.sleep(0.02)  # long enough for a second build to come in, were there no lock
        (work / "tiny").mkdir()
        (work / "tiny" / "a").write_bytes(str(len(made)).encode())
        model = ZooModel("tiny", "LlamaForCausalLM", Weights.RANDOM, 1, "nowhere", "MIT", {"a": 1})
        write_index(work, (model,))

    monkeypatch.setattr(build, "_make_models", make_models)
    return made


def failing_after_some_files(error: BaseException) -> Callable[[Path, Path | None, Progress], None]:
    def make_models(work: Path, wheel: Path | None, progress: Progress) -> None:
        (work / "half.safetensors").write_bytes(b"half")
        raise error

    return make_models


def test_it_is_built_once(tmp_path: Path, builds: list[Path]) -> None:
    first = build_zoo(tmp_path / "cache" / "zoo")
    assert build_zoo(tmp_path / "cache" / "zoo") == first
    assert len(builds) == 1
    assert [path.name for path in first.path.parent.iterdir() if path.is_dir()] == ["zoo"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("no")])
def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(build, "_make_models", failing_after_some_files(error))
    with pytest.raises(type(error)):
        build_zoo(tmp_path / "zoo")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_a_killed_build_left_is_thrown_away(tmp_path: Path, builds: list[Path]) -> None:
    left = tmp_path / ".zoo.building"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"half")
    zoo = build_zoo(tmp_path / "zoo")
    assert not left.exists()
    assert sorted(path.name for path in zoo.path.iterdir()) == ["tiny", "zoo.json"]


def test_builds_at_the_same_time_make_one_zoo(tmp_path: Path, builds: list[Path]) -> None:
    start = threading.Barrier(4)
    found: list[str] = []

    def run() -> None:
        start.wait()
        zoo = build_zoo(tmp_path / "zoo")
        found.append((zoo.path / "tiny" / "a").read_text())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["1"] * 4
    assert len(builds) == 1


def test_a_damaged_zoo_is_replaced(tmp_path: Path, builds: list[Path]) -> None:
    build_zoo(tmp_path / "zoo")
    (tmp_path / "zoo" / "tiny" / "a").unlink()
    build_zoo(tmp_path / "zoo")
    assert (tmp_path / "zoo" / "tiny" / "a").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["zoo"]


def test_somebody_elses_folder_is_not_touched(tmp_path: Path, builds: list[Path]) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"exists and is not a demo zoo"):
        build_zoo(tmp_path)
    assert builds == []
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_an_empty_folder_is_filled(tmp_path: Path, builds: list[Path]) -> None:
    (tmp_path / "zoo").mkdir()
    build_zoo(tmp_path / "zoo")
    assert open_zoo(tmp_path / "zoo") is not None


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path, builds: list[Path]) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot build the demo zoo in .*file/zoo"):
        build_zoo(tmp_path / "file" / "zoo")


def test_a_full_disk_is_told_in_bytes(
    tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILD_BYTES", 10**18)
    with pytest.raises(ConfigError, match=r"needs 1,000,000,000,000,000,000 bytes of disk; .* bytes free"):
        build_zoo(tmp_path / "zoo")
    assert builds == []
