"""The settings that a saved plan stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosspool.cli.settings import ModelEntry, Settings
from crosspool.core.config import SchedulerConfig
from crosspool.core.errors import ConfigError
from crosspool.planner.plan_file import read_plan_file


def planned_settings(path: Path, models: Sequence[ModelEntry]) -> Settings:
    """Pools and admission as a plan has them; the limit of running sequences is raised, never lowered.

    Raises ConfigError if it knows nothing of a model to serve.
    """
    plan = read_plan_file(path)
    planned = {_plain(name) for name in plan.models}
    for model in models:
        name = model.place.rstrip("/") if model.name is None else model.name
        if _plain(name) not in planned:
            known = ", ".join(sorted(planned))
            raise ConfigError(f"{path} plans for {known}, not for {name!r}: plan again with all models")
    return Settings(
        pools={"kv_pool_bytes": plan.kv_pool_bytes, "page_bytes": plan.page_bytes},
        scheduler={
            "max_running": max(plan.max_running, SchedulerConfig().max_running),
            "tbt_target": plan.tbt_target,
        },
    )


def _plain(name: str) -> str:
    """Without an organisation or folder before it, the number of its turn behind it, and case."""
    return name.rpartition("/")[2].partition("#")[0].lower()
