"""Tables on a terminal, or in a file without line breaks inside cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH_OF_FILES = 240


def output_console() -> Console:
    """Standard output; wide enough for any table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_FILES)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of plain text under a title."""
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
