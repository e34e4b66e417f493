"""The options of ``crosspool bench``, as typer reads them from annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_REQUESTS = 32
DEFAULT_CONCURRENCY = 1

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="Each gets the whole load, all at the same time. Without any: all that the server lists.",
        show_default=False,
    ),
]
Requests = Annotated[
    int | None, typer.Option(help="Requests to each model.", show_default=str(DEFAULT_REQUESTS))
]
Duration = Annotated[
    float | None, typer.Option(metavar="S", help="Instead: send for so many seconds, then wait for the end.")
]
Rate = Annotated[
    float | None,
    typer.Option(metavar="R", help="Open loop: so many requests a second to each model, at random times."),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        metavar="C",
        help="Closed loop: so many requests to each model at all times.",
        show_default=str(DEFAULT_CONCURRENCY),
    ),
]
PromptTokens = Annotated[
    str, typer.Option(metavar="N", help="Tokens of each prompt: a number, or a range such as 128-1024.")
]
OutputTokens = Annotated[str, typer.Option(metavar="N", help="Tokens of each answer: a number or a range.")]
TokenIds = Annotated[str, typer.Option(metavar="RANGE", help="The token ids that prompts are drawn from.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same prompts at the same times.")]
Timeout = Annotated[float, typer.Option(metavar="S", help="Give a request up after so many seconds.")]
ServerPid = Annotated[
    int | None, typer.Option(metavar="PID", help="Watch this server's memory and processor time as well.")
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write everything there as JSON, with each request's times."),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw a plot: FILE.png, FILE.svg or FILE.pdf.")
]
