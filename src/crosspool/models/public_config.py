"""A public config.json, read with types and ranges checked. Standard library only."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosspool.core.errors import CorruptCheckpointError, UnsupportedModelError

MAX_JSON_BYTES = 64 << 20
MAX_SIZE = 2**31 - 1
MAX_COUNT = 1 << 16
"""The most layers, heads or experts that are believed."""
MAX_NUMBER = sys.float_info.max


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises CorruptCheckpointError naming the file."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CorruptCheckpointError(f"{file} has {size:,} bytes, at most {MAX_JSON_BYTES:,} are read")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorruptCheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class PublicConfig:
    """The fields of one config.json. A field left out has the default of the public config class.

    Getters raise CorruptCheckpointError, naming the file and the field, for a wrong type or range. Where
    several names are given they are aliases of one field, the first that is present counts.
    """

    file: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def get(self, *names: str) -> Any:
        """The raw value; None where it is null or has no default."""
        for name in names:
            if name in self.values:
                return self.values[name]
        return self.defaults.get(names[0])

    def size(self, *names: str, low: int = 1, high: int = MAX_SIZE) -> int:
        """An integer from ``low`` to ``high``."""
        value = self.get(*names)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise self.wrong(names[0], value, f"an integer from {low:,} to {high:,}")

    def count(self, *names: str, low: int = 1) -> int:
        """The number of layers, heads or experts."""
        return self.size(*names, low=low, high=MAX_COUNT)

    def optional_size(self, *names: str, low: int = 1) -> int | None:
        return None if self.get(*names) is None else self.size(*names, low=low)

    def number(self, name: str) -> float:
        """A finite number above 0, at most MAX_NUMBER."""
        return self.number_in(self.get(name), name)

    def number_in(self, value: object, name: str) -> float:
        """As ``number``, for a value found inside a nested field."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, value, "a number above 0")
        # Compared before it is converted: an integer of any length may stand in a JSON file.
        if 0 < value <= MAX_NUMBER:
            return float(value)
        raise self.wrong(name, value, "a number above 0")

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def wrong(self, name: str, value: object, wanted: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.file}: {name} must be {wanted}, not {value!r}")

    def unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.file}: {what}")
