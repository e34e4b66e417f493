from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crosspool.cli import machine
from crosspool.cli.app import app
from crosspool.cli.machine import Bandwidth

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor = machine.Processor(
        "Fast 9000", 8, {"avx2": True, "amx_bf16": False}, (machine.NumaNode(0, "0-7", 3 << 30),)
    )
    monkeypatch.setattr(machine, "find_processor", lambda: processor)
    monkeypatch.setattr(machine, "find_memory", lambda: machine.Memory(8 << 30, 2 << 30, 4 << 30))
    monkeypatch.setattr(machine, "find_gpus", lambda: ["GPU A, 80 GiB"])
    monkeypatch.setattr(
        machine, "measure_bandwidth", lambda threads, size: Bandwidth(threads, size * threads)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_is_printed() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    printed = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "processor Fast 9000, 8 cores to run on",
        "instructions avx2; without amx_bf16",
        "NUMA node 0 cores 0-7, 3.00 GiB",
        "memory 8.00 GiB, 2.00 GiB available, limited to 4.00 GiB",
        "memory reads 0.5 GB/s with 1 thread",
        "memory reads 4.3 GB/s with 8 threads",
        "GPUs GPU A, 80 GiB (this version computes on the CPU only)",
        "demo zoo not built; build it with: crosspool demo build",
    ):
        assert line in printed
    assert any(machine.BANDWIDTH_METHOD in line for line in printed)


def test_json() -> None:
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert report["processor"]["cores"] == 8
    assert report["bandwidth"] == [
        {"threads": 1, "bytes_per_second": 1 << 29},
        {"threads": 8, "bytes_per_second": 1 << 32},
    ]
    assert report["bandwidth_method"] == machine.BANDWIDTH_METHOD
    assert report["demo_zoo"] is None
    assert {"python", "torch", "transformers", "crosspool"} <= set(report["versions"])


def test_bandwidth_may_be_left_out() -> None:
    report = json.loads(CliRunner().invoke(app, ["doctor", "--no-bandwidth", "--json"]).stdout)
    assert report["bandwidth"] == []


@pytest.mark.parametrize(
    ("gpus", "text"), [(None, "none seen (there is no nvidia-smi)"), ([], "none seen by nvidia-smi")]
)
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, gpus: list[str] | None, text: str) -> None:
    monkeypatch.setattr(machine, "find_gpus", lambda: gpus)
    assert text in CliRunner().invoke(app, ["doctor"]).stdout
