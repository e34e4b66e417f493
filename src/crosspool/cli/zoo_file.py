"""Reads a zoo file: the models to serve and every setting, in TOML.

Tables: ``[[models]]``, ``[pools]``, ``[devices]``, ``[scheduler]``, ``[server]``, ``[server.limits]`` and
``[server.supervision]``. A key that is not known is an error, since it would otherwise be a setting that
silently does nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias, get_args, get_type_hints

from crosspool.cli.settings import ModelEntry, Settings
from crosspool.cli.sizes import parse_bytes
from crosspool.core.config import MILLISECOND, Kernels, Mode, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.errors import ConfigError
from crosspool.core.ids import Nanoseconds
from crosspool.core.topology import Sharding
from crosspool.server.config import LimitsConfig, ServerConfig, SupervisionConfig

Reader: TypeAlias = Callable[[object], Any]
"""Turns a TOML value into a setting, or raises TypeError or ConfigError saying what it should be."""

Keys: TypeAlias = Mapping[str, tuple[str, Reader]]
"""The keys of a table: name of the setting and how it is read."""


def read_zoo_file(path: Path) -> Settings:
    """The settings in a zoo file. Raises ConfigError naming the file, the table and the key at fault."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        return _settings(document, path.absolute().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _settings(document: dict[str, Any], base: Path) -> Settings:
    server = _table(document, "server")
    limits, supervision = (_table(server, name, "server.") for name in ("limits", "supervision"))
    models = document.pop("models", [])
    if not isinstance(models, list) or not all(isinstance(entry, dict) for entry in models):
        raise ConfigError("models must be tables, each headed [[models]]")
    settings = Settings(
        models=tuple(ModelEntry(base=base, **_read(entry, _MODEL, "models", ("path",))) for entry in models),
        pools=_read(_table(document, "pools"), _keys_of(PoolConfig), "pools"),
        devices=_read(_table(document, "devices"), _DEVICES, "devices"),
        scheduler=_read(_table(document, "scheduler"), _keys_of(SchedulerConfig), "scheduler"),
        server=_read(server, _keys_of(ServerConfig), "server"),
        limits=_read(limits, _keys_of(LimitsConfig), "server.limits"),
        supervision=_read(supervision, _keys_of(SupervisionConfig), "server.supervision"),
    )
    if document:
        known = "models, pools, devices, scheduler, server"
        raise ConfigError(f"unknown table or key {next(iter(document))!r}; there are {known}")
    return settings


def _table(document: dict[str, Any], name: str, prefix: str = "") -> dict[str, Any]:
    """Take a table out of the document; an absent one is empty."""
    table = document.pop(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} must be a table, headed [{prefix}{name}]")
    return table


def _read(table: dict[str, Any], keys: Keys, where: str, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    for key in needed:
        if key not in table:
            raise ConfigError(f"[{where}] lacks the key {key!r}")
    settings = {}
    for key, value in table.items():
        if key not in keys:
            raise ConfigError(f"unknown key {key!r} in [{where}]; there are {', '.join(sorted(keys))}")
        setting, read = keys[key]
        try:
            settings[setting] = read(value)
        except TypeError as error:
            raise ConfigError(f"{key!r} in [{where}] must be {error}, not {value!r}") from error
        except ConfigError as error:
            raise ConfigError(f"{key!r} in [{where}]: {error}") from error
    return settings


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("an integer")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError("a number")
    return float(value)


def _size(value: object) -> int:
    if isinstance(value, str):
        return parse_bytes(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("a number of bytes, such as 1073741824 or '1GiB'")
    return value


def _milliseconds(value: object) -> Nanoseconds:
    return Nanoseconds(round(_number(value) * MILLISECOND))


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("a list of texts")
    return tuple(value)


def _one_of(kinds: type[StrEnum]) -> Reader:
    """Reads one of these names."""

    def read(value: object) -> StrEnum:
        try:
            return kinds(_text(value))
        except ValueError as error:
            raise TypeError(" or ".join(repr(str(kind)) for kind in kinds)) from error

    return read


def _keys_of(config: type) -> Keys:
    """The keys of a table that is a config: its fields by name, where a time has ``_ms`` added.

    Fields that a table cannot hold, such as configs within the config, are left out.
    """
    readers: dict[Any, Reader] = {int: _integer, float: _number, bool: _flag, str: _text}
    keys: dict[str, tuple[str, Reader]] = {}
    for name, hint in get_type_hints(config).items():
        kind = next((part for part in get_args(hint) if part is not NoneType), hint)
        if kind is Nanoseconds:
            keys[f"{name}_ms"] = (name, _milliseconds)
        elif name.endswith("_bytes"):
            keys[name] = (name, _size)
        elif kind in readers:
            keys[name] = (name, readers[kind])
        elif isinstance(kind, type) and issubclass(kind, StrEnum):
            keys[name] = (name, _one_of(kind))
    return keys


_MODEL: Keys = {**_keys_of(ModelConfig), "path": ("place", _text)}
_DEVICES: Keys = {
    "kv_devices": ("kv_devices", _texts),
    "weights_devices": ("weights_devices", _texts),
    "ffn_sharding": ("sharding", _one_of(Sharding)),
    "threads": ("threads", _integer),
    "kernels": ("kernels", _one_of(Kernels)),
    "mode": ("mode", _one_of(Mode)),
}
