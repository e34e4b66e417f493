from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from crosspool.cli.machine import (
    NumaNode,
    find_gpus,
    find_memory,
    find_processor,
    find_versions,
    measure_bandwidth,
)

pytestmark = pytest.mark.unit


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_processor_as_the_kernel_describes_it(tmp_path: Path) -> None:
    write(
        tmp_path / "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: sse2 avx2 avx512f\n\nprocessor\t: 1\n",
    )
    nodes = tmp_path / "sys/devices/system/node"
    for node in (10, 2, 7, 0, 11, 4):
        write(nodes / f"node{node}/cpulist", f"{node}\n")
        total = f"Node {node} MemTotal:  {node + 1024} kB\n"
        write(nodes / f"node{node}/meminfo", f"{total}Node {node} MemFree: 1 kB\n")
    found = find_processor(tmp_path / "proc", tmp_path / "sys")
    assert found.model == "Fast 9000"
    assert found.features == {"avx2": True, "avx512f": True, "avx512_bf16": False, "amx_bf16": False}
    assert found.numa_nodes == tuple(
        NumaNode(node, str(node), (node + 1024) * 1024) for node in (0, 2, 4, 7, 10, 11)
    )
    assert found.cores == len(os.sched_getaffinity(0))


def test_a_kernel_without_numa(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", "Features : asimd\n")
    assert find_processor(tmp_path / "proc", tmp_path / "sys").numa_nodes == ()


def test_memory_and_the_limit_of_the_control_group(tmp_path: Path) -> None:
    write(tmp_path / "memory.max", "1048576\n")
    memory = find_memory(tmp_path / "memory.max")
    assert memory.limit_bytes == 1048576
    assert 0 < memory.available_bytes <= memory.total_bytes
    write(tmp_path / "memory.max", "max\n")
    assert find_memory(tmp_path / "memory.max").limit_bytes is None
    assert find_memory(tmp_path / "none").limit_bytes is None


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_is_a_speed_that_memory_can_have(threads: int) -> None:
    measured = measure_bandwidth(threads, 4 << 20)
    assert measured.threads == threads
    assert 1e8 < measured.bytes_per_second < 1e13


def test_gpus_are_those_that_the_drivers_tool_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU A, 80 GiB'\necho 'GPU B, 40 GiB'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert find_gpus() == ["GPU A, 80 GiB", "GPU B, 40 GiB"]
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert find_gpus() == []


def test_versions_of_what_is_installed_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosspool.cli.machine.PACKAGES", ("typer", "no-such-package"))
    versions = find_versions()
    assert versions["no-such-package"] == "not installed"
    assert versions["typer"][0].isdigit()
    assert versions["python"].startswith("3.")
