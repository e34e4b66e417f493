"""The commands of the README, with the real engine and the demo models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers_zoo import model_folder

pytestmark = pytest.mark.integration

CROSSPOOL = [sys.executable, "-c", "from crosspool.cli import main; main()"]


def crosspool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CROSSPOOL, *arguments], capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Any]]:
    """A server of two demo models and a folder that holds no model: its first line of JSON, its process."""
    broken: Path = tmp_path_factory.mktemp("broken")
    command = [*CROSSPOOL, "serve", str(model_folder("smollm2-moe-4x"))]
    command += [f"random={model_folder('random-deepseek-v2')}", f"broken={broken}"]
    command += ["--kv-pool-bytes", "64MiB", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield json.loads(line or "{}"), process
        finally:
            process.kill()


def test_serve_chat_models_and_an_orderly_end(served: tuple[dict[str, Any], Any]) -> None:
    ready, process = served
    assert [(model["name"], model["error"] is None) for model in ready["models"]] == [
        ("smollm2-moe-4x", True),
        ("random", True),
        ("broken", False),
    ]
    assert ready["kv_pages"] * ready["page_bytes"] <= 64 * 2**20
    url = ready["url"]

    answer = crosspool("chat", "smollm2-moe-4x", "What is the capital of France?", "--url", url)
    assert (answer.returncode, answer.stdout) == (0, "The capital of France is Paris.\n")

    listed = json.loads(crosspool("models", "--url", url, "--json").stdout)
    assert [(model["name"], model["ready"]) for model in listed] == [
        ("smollm2-moe-4x", True),
        ("random", True),
        ("broken", False),
    ]
    assert "config.json" in listed[2]["error"]

    unknown = crosspool("chat", "nobody", "hi", "--url", url)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "answered 404" in unknown.stderr

    busy = crosspool("serve", str(model_folder("smollm2-moe-4x")), "--port", url.rpartition(":")[2])
    assert (busy.returncode, busy.stdout) == (2, "")
    assert "in use by another process" in busy.stderr

    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Loaded smollm2-moe-4x, 712 MiB" in log
    assert "broken will not be served: " in log
    assert "Traceback" not in log
