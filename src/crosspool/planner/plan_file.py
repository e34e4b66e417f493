"""A saved plan, as ``crosspool serve`` takes it. No NumPy: a server that reads one imports nothing for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosspool.core.config import MILLISECOND
from crosspool.core.errors import ConfigError
from crosspool.core.ids import Nanoseconds

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ServedPlan:
    """What serving takes from a plan: sizes in bytes, and how requests are admitted.

    ``max_running`` sequences may hold pages at once: with fewer, that limit would make requests wait and not
    the pool. ``risk`` is the share of requests that may wait.
    """

    models: tuple[str, ...]
    kv_pool_bytes: int
    page_bytes: int
    max_running: int
    tbt_target: Nanoseconds
    risk: float


def write_plan_file(plan: dict[str, Any], path: Path) -> None:
    """Save a plan's dictionary. Raises OSError."""
    path.write_text(json.dumps(plan, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_plan_file(path: Path) -> ServedPlan:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise ConfigError(f"{path} is no plan of format {FORMAT}: make one with crosspool plan --save")
    admission = _get(path, plan, "admission", dict)
    models = _get(path, plan, "models", list)
    return ServedPlan(
        models=tuple(str(name) for name in models),
        kv_pool_bytes=_positive(path, plan, "kv_pool_bytes"),
        page_bytes=_positive(path, plan, "page_bytes"),
        max_running=_positive(path, admission, "max_running"),
        tbt_target=Nanoseconds(round(_number(path, admission, "tbt_target_ms") * MILLISECOND)),
        risk=_number(path, admission, "risk"),
    )


def _get(path: Path, table: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{path}: {key} cannot be {value!r}")
    return value


def _positive(path: Path, table: dict[str, Any], key: str) -> int:
    value: int = _get(path, table, key, int)
    if value < 1:
        raise ConfigError(f"{path}: {key} must be above 0, not {value}")
    return value


def _number(path: Path, table: dict[str, Any], key: str) -> float:
    value = float(_get(path, table, key, (int, float)))
    if not 0 < value < float("inf"):
        raise ConfigError(f"{path}: {key} must be above 0, not {value}")
    return value
