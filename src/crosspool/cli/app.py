"""Puts the commands together, and turns CrossPool's errors into one line and an exit status."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from crosspool import __version__
from crosspool.cli import bench, chat, demo, doctor, models, plan, serve
from crosspool.core.errors import ConfigError, CrossPoolError

CONFIG_ERROR = 2
OTHER_ERROR = 1


class CrossPoolGroup(TyperGroup):
    """Ends with status 2 if the configuration cannot work and 1 for any other error of CrossPool."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CrossPoolError as error:
            typer.echo(f"crosspool: {error}", err=True)
            raise typer.Exit(CONFIG_ERROR if isinstance(error, ConfigError) else OTHER_ERROR) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crosspool {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=CrossPoolGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def crosspool(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve many mostly idle language models from one machine, behind one OpenAI-compatible endpoint.

    Try it with the demo models:

        crosspool serve --demo

    and in a second terminal:

        crosspool chat smollm2-moe-4x "What is the capital of France?"
    """


app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("models")(models.models)
app.command("bench")(bench.bench)
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
app.add_typer(demo.app, name="demo")
