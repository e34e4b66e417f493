from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from crosspool.cli.app import app
from crosspool.cli.bench import command_line
from helpers_stream_server import Behaviour, StreamServer, stream_server

pytestmark = pytest.mark.integration

SMALL = ["--requests", "3", "--prompt-tokens", "8", "--output-tokens", "4-6"]


@pytest.fixture
def server() -> Iterator[StreamServer]:
    models = {"good": Behaviour(), "pairs": Behaviour(tokens_per_event=2), "bad": Behaviour(fail_every=1)}
    with stream_server(**models) as running:
        yield running


def run(server: StreamServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "--url", server.url, *SMALL, *arguments])


def test_tables_and_notes(server: StreamServer) -> None:
    result = run(server, "good", "bad", "--server-pid", str(os.getpid()), "--api-key", "k")
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert [row for row in rows if row.startswith(("good TTFT 3 ", "bad E2E 0", "(all) TBT "))]
    assert any(row.startswith("bad 3 3 (100.0%) 0 0") for row in rows)
    assert "bad: HTTP 500: 3 of 3 requests, the first with: lost it" in rows
    assert "closed loop: TTFT and E2E run from when a request was sent" in rows
    assert f"the server, process {os.getpid()}: RSS " in result.stdout
    assert server.keys == {"Bearer k"}


def test_json_and_files(server: StreamServer, tmp_path: Path) -> None:
    output, plot = tmp_path / "run.json", tmp_path / "run.png"
    files = ["--output", str(output), "--plot", str(plot)]
    result = run(server, "good", "pairs", "--rate", "100", "--json", *files)
    assert result.exit_code == 0, result.output
    printed, written = json.loads(result.stdout), json.loads(output.read_text())
    assert printed == {name: value for name, value in written.items() if name != "requests"}
    assert printed["models"]["good"]["tokens_per_event"] == 1
    assert 1 < printed["models"]["pairs"]["tokens_per_event"] <= 2
    assert printed["versions"]["crosspool"] and printed["machine"]["processor"]["cores"]
    assert len(written["requests"]) == 6
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_models_all_that_the_server_lists(server: StreamServer) -> None:
    assert [*json.loads(run(server, "--json").stdout)["models"]] == ["good", "pairs", "bad"]


def test_nothing_but_failures_is_status_1(server: StreamServer) -> None:
    result = run(server, "bad")
    assert result.exit_code == 1
    assert "bad: HTTP 500" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "1", "--concurrency", "1"], "either rate or concurrency"),
        (["--duration", "1"], "either requests or duration"),
        (["--output", "/no/such/folder/run.json"], "there is no folder /no/such/folder"),
        (["--plot", "run.txt"], "ends with one of"),
        (["--prompt-tokens", "few"], "'few' is neither a number from 1"),
        (["--server-pid", "-1"], "there is no process -1"),
    ],
)
def test_what_cannot_work_is_told_before_the_load(
    server: StreamServer, arguments: list[str], said: str
) -> None:
    result = run(server, "good", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert server.models["good"].bodies == []


def test_no_such_model(server: StreamServer) -> None:
    result = run(server, "best")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "HTTP 404: no model best" in result.stderr


def test_ctrl_c_prints_what_it_has(server: StreamServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from crosspool.cli import main; main()", "bench", "pairs"]
    command += ["--url", server.url, "--json", *SMALL[2:], "--duration", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len(server.models["pairs"].bodies) < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    plain = json.loads(out)
    assert (process.returncode, err) == (1, "")
    assert plain["interrupted"] is True
    assert plain["models"]["pairs"]["finished"] >= 2


def test_the_command_line_has_no_key() -> None:
    words = ["/usr/bin/crosspool", "bench", "--api-key", "secret", "--api-key=secret", "a b"]
    assert command_line(words, "secret") == "crosspool bench --api-key KEY --api-key=KEY 'a b'"
    assert command_line(words[:2], None) == "crosspool bench"
