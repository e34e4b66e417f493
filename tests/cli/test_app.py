from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from crosspool import __version__
from crosspool.cli.app import CrossPoolGroup, app
from crosspool.core.errors import ConfigError, CrossPoolError, EngineDeadError

pytestmark = pytest.mark.unit

COMMANDS = [["serve"], ["chat"], ["bench"], ["models"], ["doctor"]]
COMMANDS += [["demo"], ["demo", "build"], ["demo", "path"]]
HEAVY = ("torch", "transformers", "fastapi", "httpx", "huggingface_hub", "numpy")


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_explains_itself(command: list[str], option: str) -> None:
    result = CliRunner().invoke(app, [*command, option])
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != ["demo"]], ids=" ".join)
def test_every_commands_help_has_an_example_and_offers_json(command: list[str]) -> None:
    text = CliRunner().invoke(app, [*command, "--help"]).stdout
    assert "  crosspool " in text
    assert "--json" in text


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"crosspool {__version__}\n")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([*c, "--help"] for c in COMMANDS)])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from crosspool.cli import main\n"
        f"sys.argv = ['crosspool', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"heavy = sorted(set({HEAVY}) & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "crosspool" in done.stdout


@pytest.mark.parametrize(("error", "status"), [(ConfigError, 2), (EngineDeadError, 1), (CrossPoolError, 1)])
def test_an_error_is_one_line_and_a_status(error: type[CrossPoolError], status: int) -> None:
    failing = typer.Typer(cls=CrossPoolGroup)
    failing.callback()(lambda: None)

    @failing.command()
    def fail() -> None:
        raise error("no such thing")

    result = CliRunner().invoke(failing, ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", "crosspool: no such thing\n")


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["dance"])
    assert result.exit_code == 2
    assert "dance" in result.stderr
