from __future__ import annotations

import io

import pytest
from rich.console import Console

from crosspool.cli.progress import LoadBars
from crosspool.core.info import LoadProgress

pytestmark = pytest.mark.unit


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_one_line_for_each_model() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with LoadBars(console, "Loaded") as bars:
        for done in (0, 1024, 2048, 2048):
            bars(LoadProgress("a", done, 2048))
        bars(LoadProgress("b", 0, 10))
        bars(LoadProgress("b", 5, 10, "a [tensor] is missing"))
        bars(LoadProgress("b", 5, 10, "a [tensor] is missing"))
    assert shown(console) == "Loaded a, 2.00 KiB\nb will not be served: a [tensor] is missing\n"


def test_a_terminal_gets_a_bar_for_each_model() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with LoadBars(console, "Loaded") as bars:
        bars(LoadProgress("a", 512, 2048))
        bars(LoadProgress("b", 2048, 2048))
    text = shown(console)
    assert "0.5/2.0 KiB" in text
    assert "2.0/2.0 KiB" in text
    assert "Loaded" not in text


def test_stopping_twice_is_fine() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with LoadBars(console, "Loaded") as bars:
        bars.stop()
        bars(LoadProgress("a", 1, 2))
