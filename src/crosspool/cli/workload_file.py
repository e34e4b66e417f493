"""Reads a workload file: models, how often they are asked and how long their requests are, in TOML.

::

    hours = 24                     # of requests to draw; 24 if not given
    [[models]]
    model = "Qwen3-30B-A3B"        # a public name, a folder or a config.json
    name = "chat"                  # as the model's if not given
    rate = 0.02                    # requests a second, on average
    burst = 3                      # requests that come together, on average; 1 if not given
    prompt_tokens = { median = 800, p99 = 8000 }
    output_tokens = { median = 300, p99 = 1600 }
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosspool.core.errors import ConfigError

if TYPE_CHECKING:
    from crosspool.planner.workload import Expected, Lengths

HOURS = 24.0
KEYS = ("model", "name", "rate", "burst", "prompt_tokens", "output_tokens")
NEEDED = ("model", "rate", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class WorkloadModel:
    """One model of the file, and what is expected of it."""

    place: str
    name: str | None
    expected: Expected


@dataclass(frozen=True, slots=True)
class Workload:
    models: tuple[WorkloadModel, ...]
    hours: float


def read_workload_file(path: Path) -> Workload:
    """Raises ConfigError naming the file, the model and the key at fault."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    models = document.pop("models", None)
    hours = document.pop("hours", HOURS)
    if document:
        raise ConfigError(f"{path}: unknown key {next(iter(document))!r}; there are hours and models")
    if not isinstance(models, list) or not models or not all(isinstance(entry, dict) for entry in models):
        raise ConfigError(f"{path}: models must be tables, each headed [[models]]")
    try:
        return Workload(
            tuple(_model(entry, number) for number, entry in enumerate(models)), _number(hours, "hours")
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _model(entry: dict[str, Any], number: int) -> WorkloadModel:
    from crosspool.planner.workload import Expected

    where = f"models[{number}]"
    for key in NEEDED:
        if key not in entry:
            raise ConfigError(f"{where} lacks the key {key!r}")
    for key in entry:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key!r} in {where}; there are {', '.join(KEYS)}")
    for key in ("model", "name"):
        if not isinstance(entry.get(key, ""), str):
            raise ConfigError(f"{where}.{key} must be text, not {entry[key]!r}")
    try:
        expected = Expected(
            rate=_number(entry["rate"], "rate"),
            prompt=_lengths(entry["prompt_tokens"], "prompt_tokens"),
            output=_lengths(entry["output_tokens"], "output_tokens"),
            burst=_number(entry.get("burst", 1), "burst"),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return WorkloadModel(entry["model"], entry.get("name"), expected)


def _lengths(value: object, key: str) -> Lengths:
    from crosspool.planner.workload import Lengths

    if not isinstance(value, dict) or set(value) != {"median", "p99"}:
        raise ConfigError(f"{key} must be like {{ median = 800, p99 = 8000 }}, not {value!r}")
    try:
        return Lengths(_number(value["median"], "median"), _number(value["p99"], "p99"))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _number(value: object, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{key} must be a number, not {value!r}")
    return float(value)
