from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from crosspool.cli.app import app
from helpers_canned_server import CannedServer, canned_server

pytestmark = pytest.mark.integration

GOOD = {
    "name": "good",
    "ready": True,
    "error": None,
    "residency": "resident",
    "attention_bytes": 100 * 2**20,
    "ffn_bytes": 3 * 2**30,
    "kv_bytes_per_token": 23040,
    "max_model_len": 4000,
}
BAD = {**GOOD, "name": "bad", "ready": False, "error": "config.json is missing"}
LOADING = {"name": "slow", "ready": False, "error": None, "loaded_bytes": 1, "total_bytes": 2}


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with canned_server() as canned:
        canned.answer_json("/ready", {"models": [GOOD, BAD, LOADING]})
        yield canned


def test_state_and_sizes(server: CannedServer) -> None:
    result = CliRunner().invoke(app, ["models", "--url", server.url, "--api-key", "k"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: " ".join(line.split()) for line in result.stdout.splitlines() if line.strip()}
    assert rows["good"] == "good resident 100 MiB 3.00 GiB 22.5 KiB 4,000 tokens"
    assert rows["bad"] == "bad failed"
    assert rows["slow"] == "slow not ready"
    assert "bad: config.json is missing" in result.stdout
    assert server.keys == ["Bearer k"]


def test_json(server: CannedServer) -> None:
    result = CliRunner().invoke(app, ["models", "--url", server.url, "--json"])
    assert json.loads(result.stdout) == [GOOD, BAD, LOADING]
