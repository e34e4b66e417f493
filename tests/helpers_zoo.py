"""The demo zoo for integration tests: built in the user's cache the first time, then reused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from crosspool.demo.build import build_zoo
from crosspool.demo.zoo import Zoo, default_zoo_path


@cache
def demo_zoo() -> Zoo:
    return build_zoo(default_zoo_path())


def model_folder(name: str) -> Path:
    zoo = demo_zoo()
    return next(zoo.folder(model) for model in zoo.models if model.name == name)
