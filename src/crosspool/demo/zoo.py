"""The zoo on disk: an index of its models, and how to find them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from crosspool.core.errors import ConfigError
from crosspool.demo.checkpoint import write_json

ZOO_VERSION = 1
"""Raised whenever the models that a build makes change; a zoo of another version is built anew."""

INDEX_NAME = "zoo.json"


class Weights(StrEnum):
    """Where a model's weights come from. UPCYCLED: made from real ones without changing what is computed."""

    REAL = "real"
    UPCYCLED = "upcycled"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class ZooModel:
    """One model of the zoo. ``files`` are the sizes in bytes of all its files by name."""

    name: str
    architecture: str
    weights: Weights
    parameters: int
    source: str
    licence: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True, slots=True)
class Zoo:
    """A finished zoo in a folder, one folder inside it for each model."""

    path: Path
    models: tuple[ZooModel, ...]

    def folder(self, model: ZooModel) -> Path:
        return self.path / model.name

    @property
    def bytes(self) -> int:
        return sum(model.bytes for model in self.models)


def default_zoo_path() -> Path:
    """``crosspool/zoo`` in the user's cache folder (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    return cache / "crosspool" / "zoo"


def open_zoo(path: Path) -> Zoo | None:
    """The zoo in ``path``, or None if there is no finished one of this version.

    A zoo counts as finished if every file of its index is there with its size.
    """
    index = _read_index(path)
    if index is None or index.get("version") != ZOO_VERSION:
        return None
    try:
        models = tuple(_model(entry) for entry in index["models"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path / INDEX_NAME} is not a zoo's index: {error!r}") from error
    for model in models:
        for name, size in model.files.items():
            file = path / model.name / name
            if not file.is_file() or file.stat().st_size != size:
                return None
    return Zoo(path, models)


def is_zoo(path: Path) -> bool:
    """Whether the folder holds a zoo of any version, finished or damaged."""
    return _read_index(path) is not None


def write_index(path: Path, models: tuple[ZooModel, ...]) -> None:
    """Write zoo.json. ``folder`` and ``bytes`` are for the reader's convenience."""
    entries = [{**asdict(model), "folder": model.name, "bytes": model.bytes} for model in models]
    write_json(path / INDEX_NAME, {"version": ZOO_VERSION, "models": entries})


def _model(entry: dict[str, Any]) -> ZooModel:
    fields = {key: value for key, value in entry.items() if key not in ("folder", "bytes")}
    return ZooModel(**{**fields, "weights": Weights(fields["weights"])})


def _read_index(path: Path) -> dict[str, Any] | None:
    file = path / INDEX_NAME
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not a zoo's index: {error}") from error
    if not isinstance(index, dict):
        raise ConfigError(f"{file} is not a zoo's index: it holds no JSON object")
    return index
