"""Results on paper: what is in the files and the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peers.report import as_data, table, write
from peers.turns import Measured, Result, Turn

pytestmark = pytest.mark.unit

TURNS = tuple(
    Turn(name, number, Measured({"ttft_ms": ms * (number + 1)}, {"tbt_ms": [1.0, 2.0]}), {1: 2e9, 2: 4e9})
    for number in range(2)
    for name, ms in (("crosspool:2", 100.0), ("other:1", 212.3456))
)
RESULT = Result("ttft", "some-model", TURNS, {"crosspool:2": ["crosspool serve"], "other:1": ["a", "b"]})


def test_data_has_figures_ratios_and_every_turn() -> None:
    data = as_data(RESULT)
    assert data["figures"]["other:1"]["ttft_ms"] == 318.5
    assert data["times_better"]["other:1"]["ttft_ms"] == 2.123
    assert data["figures"]["crosspool:2"]["read_gb_per_second"] == 4
    assert [turn["values"]["ttft_ms"] for turn in data["turns"]] == [100, 212.3, 200, 424.7]
    assert data["turns"][0]["samples"] == {"tbt_ms": 2}
    assert data["commands"]["other:1"] == ["a", "b"]


def test_table_has_a_column_for_each_contender_and_comparison() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(as_data(RESULT))]
    assert cells[0] == [
        "some-model, 2 rounds",
        "crosspool:2",
        "other:1",
        "crosspool:2 better than other:1",
    ]
    assert cells[2] == ["ttft_ms", "150", "318.5", "2.123 x"]
    assert cells[-1] == ["read_gb_per_second", "4", "4", ""]


def test_a_ratio_to_nothing_is_left_out() -> None:
    turns = [
        Turn(name, 0, Measured({"finished": count}), {1: 1.0}) for name, count in (("A", 2.0), ("B", 0.0))
    ]
    data = as_data(Result("eight", "models", tuple(turns)))
    assert data["times_better"] == {"B": {}}
    assert [line.split() for line in table(data)[2:3]] == [["|", "finished", "|", "2", "|", "0", "|", "|"]]


def test_page_has_all_experiments_of_the_folder(tmp_path: Path) -> None:
    machine = {"cores": 2, "cpu": "some processor", "crosspool": "1.0", "command": "python -m peers"}
    head = {
        "what": "something",
        "time": "today",
        "machine": machine,
        "commit": "abc",
        "peers": {"other": "3"},
    }
    for name in ("ttft", "eight", "ttft"):
        write(tmp_path, name, {"experiment": name, **head, "results": [as_data(RESULT)]})
    page = (tmp_path / "README.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## eight: something",
        "## ttft: something",
    ]
    assert page.count("318.5") == 2
    assert json.loads((tmp_path / "eight.json").read_text())["results"][0]["subject"] == "some-model"
