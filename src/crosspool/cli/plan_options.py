"""The options of ``crosspool plan``, as typer reads them from annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crosspool.cli.sizes import read_size

Models = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        help="Models in the order of the trace's indices, taken in turn if it has more: public names such as "
        "Qwen3-30B-A3B, folders or config.json files.",
        show_default=False,
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Parquet with t_seconds, model_index (or model), prompt_tokens and output_tokens.",
        show_default=False,
    ),
]
WorkloadFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="TOML with a rate and lengths for each model, in place of a trace."),
]
WeightsDtype = Annotated[
    str, typer.Option(help="As for serve: auto (as stored), or int8 or float8, as quantised while they load.")
]
TbtMs = Annotated[float, typer.Option(metavar="MS", help="Time between the tokens of a request.")]
PrefillTps = Annotated[float, typer.Option(metavar="N", help="Prompt tokens computed per second.")]
Risk = Annotated[float, typer.Option(help="The share of requests that may wait for pages.")]
Confidence = Annotated[float, typer.Option(help="How probably the next window keeps within the risk.")]
FitHours = Annotated[
    float | None,
    typer.Option(metavar="H", help="Fit the last H hours of the trace.", show_default="all of it"),
]
Since = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODEL=HOURS", help="This model is new: it is there since so many hours before the end."
    ),
]
DeviceMemory = Annotated[
    int,
    typer.Option(parser=read_size, metavar="SIZE", help="Memory of a device for weights and KV."),
]
PageBytes = Annotated[
    int | None,
    typer.Option(parser=read_size, metavar="SIZE", help="A KV page; by default chosen from the models."),
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Save = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Save the plan for crosspool serve --kv-pool plan.")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw demand and pools: .png, .svg, .pdf or .html.")
]
