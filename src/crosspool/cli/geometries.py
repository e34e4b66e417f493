"""The geometry of a model named on the command line: a public name, a folder, or a config.json."""

from __future__ import annotations

from pathlib import Path

from crosspool.core.errors import ConfigError
from crosspool.core.spec import ModelSpec


def find_spec(place: str, base: Path, weights_dtype: str = "auto") -> tuple[str, ModelSpec]:
    """The name and the geometry. Folders are relative to ``base`` and come first. ``weights_dtype`` is as for
    read_spec.

    Raises ConfigError for a name that is neither, and what reading a config.json raises.
    """
    from crosspool.models.geometries import find_geometry, geometry_names
    from crosspool.models.registry import read_spec

    folder = base / Path(place).expanduser()
    if folder.is_file() and folder.name == "config.json":
        folder = folder.parent
    if folder.is_dir():
        return folder.resolve().name, read_spec(folder, weights_dtype=weights_dtype)
    geometry = find_geometry(place)
    if geometry is None:
        raise ConfigError(
            f"no model {place!r}: it is no folder, no config.json and none of the names "
            f"{', '.join(geometry_names())}"
        )
    return place, read_spec(geometry, weights_dtype=weights_dtype)
