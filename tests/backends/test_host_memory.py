"""Memory of the machine and of its control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from crosspool.backends.host_memory import free_bytes, total_bytes

pytestmark = pytest.mark.unit

MIB = 2**20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def test_without_control_groups_the_machine_counts(tmp_path):
    assert total_bytes(tmp_path) == psutil.virtual_memory().total
    assert 0 < free_bytes(tmp_path) <= total_bytes(tmp_path)


def test_a_limit_of_version_two(tmp_path):
    write(tmp_path, max=f"{100 * MIB}\n", current=f"{90 * MIB}\n", stat=f"anon 5\ninactive_file {30 * MIB}\n")
    assert total_bytes(tmp_path) == 100 * MIB
    assert free_bytes(tmp_path) == 40 * MIB


def test_a_limit_of_version_one(tmp_path):
    write(
        tmp_path / "memory",
        limit_in_bytes=f"{64 * MIB}\n",
        usage_in_bytes=f"{70 * MIB}\n",
        stat=f"inactive_file 1\ntotal_inactive_file {8 * MIB}\n",
    )
    assert total_bytes(tmp_path) == 64 * MIB
    assert free_bytes(tmp_path) == 2 * MIB
    write(tmp_path / "memory", stat="")
    assert free_bytes(tmp_path) == 0


def test_a_group_without_a_limit_does_not_count(tmp_path):
    write(tmp_path, max="max\n", current="5\n", stat="inactive_file 1\n")
    write(tmp_path / "memory", limit_in_bytes=f"{2**63 - 4096}\n", usage_in_bytes="5\n", stat="")
    assert total_bytes(tmp_path) == psutil.virtual_memory().total
