"""Traces are read with their faults named, and cut by time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from crosspool.core.errors import ConfigError
from crosspool.sim.workload import Trace, read_trace

pytestmark = pytest.mark.unit


def write(path: Path, **columns: list[float] | list[int]) -> Path:
    whole = {
        "t_seconds": [0.5, 1.0, 601.0, 602.0, 700.0],
        "model_index": [0, 2, 0, 1, 1],
        "prompt_tokens": [10, 20, 30, 40, 50],
        "output_tokens": [1, 2, 3, 4, 5],
    }
    pyarrow.parquet.write_table(pyarrow.table(whole | columns), path)
    return path


def test_a_window_has_its_requests_and_its_own_time(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.parquet"))
    assert (len(trace), trace.num_models) == (5, 3)
    window = trace.window(1.0, 601.0)
    assert window.times.tolist() == [0.0, 600.0]
    assert window.prompts.tolist() == [20, 30] and window.models.tolist() == [2, 0]


def test_the_busiest_window_has_most_requests(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.parquet"))
    assert trace.busiest(300.0) == 600.0
    assert trace.busiest(10_000.0) == 0.0


def test_faults_of_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*nowhere"):
        read_trace(tmp_path / "nowhere.parquet")
    with pytest.raises(ConfigError, match="not sorted"):
        read_trace(write(tmp_path / "a.parquet", t_seconds=[2.0, 1.0, 3.0, 4.0, 5.0]))
    with pytest.raises(ConfigError, match="without prompt or output"):
        read_trace(write(tmp_path / "b.parquet", output_tokens=[1, 0, 1, 1, 1]))
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"t_seconds": [1.0], "model": ["a"]}), path)
    with pytest.raises(ConfigError, match="model_index, prompt_tokens, output_tokens"):
        read_trace(path)


def test_an_empty_trace_is_a_trace() -> None:
    empty = Trace(*(np.array([], dtype=kind) for kind in (float, int, int, int)))
    assert (len(empty), empty.num_models, empty.busiest(60.0)) == (0, 0, 0.0)
