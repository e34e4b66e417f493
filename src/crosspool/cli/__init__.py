"""The command line. Its modules import little but typer until a command runs, so that --help is quick."""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``crosspool`` command."""
    from crosspool.cli.app import app

    app()
