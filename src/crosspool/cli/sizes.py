"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

import typer

from crosspool.core.errors import ConfigError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgt")}
_UNITS |= {f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgt")}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")


def parse_bytes(text: str) -> int:
    """Bytes from ``2GiB``, ``500MB``, ``1.5 GiB`` or ``1048576``. Raises ConfigError for anything else."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(
            f"{text!r} is not a number of bytes: write for instance 2GiB, 500MB or 1073741824 "
            "(KiB, MiB, GiB, TiB are powers of 1024; kB, MB, GB, TB of 1000)"
        )
    return round(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]


def read_size(text: str) -> int:
    """``parse_bytes`` for options: raises BadParameter."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def format_bytes(count: int) -> str:
    """``1.50 GiB``: three digits at most after the largest unit that leaves at least 1."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    if unit == "B":
        return f"{count} B"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"
