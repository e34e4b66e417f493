from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from crosspool.cli.checkpoints import find_checkpoint
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, object]]]:
    """Replaces the hub by one that has everything; lists what it was asked for."""
    calls: list[tuple[str, dict[str, object]]] = []

    def snapshot_download(repository: str, **options: object) -> str:
        calls.append((repository, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_named_as_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    folder = tmp_path / "models" / "a"
    assert find_checkpoint("models/a", tmp_path) == ("a", folder)
    assert find_checkpoint(".", folder) == ("a", folder)
    assert find_checkpoint(str(folder), Path("/")) == ("a", folder)


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, asked: list[object]) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert find_checkpoint("org/model", tmp_path)[0] == "model"
    assert asked == []


def test_from_the_hub_only_safetensors_configs_and_tokenizers_are_taken(
    tmp_path: Path, asked: list[tuple[str, dict[str, list[str]]]]
) -> None:
    assert find_checkpoint("Qwen/Qwen3-30B-A3B", tmp_path) == ("Qwen/Qwen3-30B-A3B", tmp_path / "snapshot")
    ((repository, options),) = asked
    assert repository == "Qwen/Qwen3-30B-A3B"
    files = [
        *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"),
        *("model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"),
        *("pytorch_model.bin", "modeling_x.py", "consolidated.pth", "original/model.safetensors", "a.gguf"),
    ]
    taken = huggingface_hub.utils.filter_repo_objects(files, **options)
    assert list(taken) == files[:8]


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("long\nstory")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"no folder org/model.* the hub cannot be reached"):
        find_checkpoint("org/model", tmp_path)


def test_any_other_failure_of_the_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("disk full\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match="disk full") as caught:
        find_checkpoint("org/model", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "none", "./org/model", "/no/where", "a/b/c", "../x", "org/mo del"])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    tmp_path: Path, place: str, asked: list[object]
) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .* is no hub id"):
        find_checkpoint(place, tmp_path)
    assert asked == []


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=r"model\.gguf is a file: give the folder"):
        find_checkpoint("model.gguf", tmp_path)
