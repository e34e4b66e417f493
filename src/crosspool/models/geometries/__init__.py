"""The public config.json of some models, by the models' public names: geometry without weights."""

from __future__ import annotations

from pathlib import Path

GEOMETRIES = Path(__file__).parent


def geometry_names() -> tuple[str, ...]:
    """The names, in lower case."""
    return tuple(sorted(folder.name for folder in GEOMETRIES.iterdir() if (folder / "config.json").is_file()))


def find_geometry(name: str) -> Path | None:
    """The folder of a public model's config.json. Case and an organisation before the name do not matter."""
    wanted = name.rpartition("/")[2].lower()
    return GEOMETRIES / wanted if wanted in geometry_names() else None
