from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from crosspool.core.errors import ConfigError
from crosspool.planner.trace import HOUR, make_trace, read_trace
from crosspool.planner.workload import Expected, Lengths, draw_trace
from helpers_traces import one_page_trace, write_parquet

pytestmark = pytest.mark.unit


def columns(count: int = 30) -> dict[str, np.ndarray]:
    return {
        "t_seconds": np.arange(count) * 10.0,
        "model_index": np.arange(count) % 3,
        "prompt_tokens": np.full(count, 5),
        "output_tokens": np.arange(count),
    }


def refusal(path: Path, **changed: object) -> str:
    table = {name: values for name, values in (columns() | changed).items() if values is not None}
    parquet.write_table(pa.table(table), path)
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


def test_what_cannot_be_a_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    assert "lacks the columns output_tokens; it has t_seconds" in refusal(path, output_tokens=None)
    assert "lacks the columns model_index (or model)" in refusal(path, model_index=None)
    assert "column t_seconds must hold numbers, not string" in refusal(path, t_seconds=["1"] * 30)
    assert "column prompt_tokens has 1 empty values" in refusal(path, prompt_tokens=[None] + [1] * 29)
    assert "prompt_tokens of request 2 is 0: at least 1" in refusal(path, prompt_tokens=[1, 1, 0] + [1] * 27)
    assert "t_seconds of request 29 is nan" in refusal(path, t_seconds=[1.0] * 29 + [np.nan])
    assert "model_index of request 0 is -1" in refusal(path, model_index=[-1] * 30)


@pytest.mark.parametrize(("count", "said"), [(0, "there are none"), (1, "there is 1"), (19, "there are 19")])
def test_too_few_requests(tmp_path: Path, count: int, said: str) -> None:
    parquet.write_table(pa.table(columns(count)), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=re.escape(f"at least 20 requests, and {said}")):
        read_trace(tmp_path / "t.parquet")


def test_files_that_are_not_there_or_not_parquet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_trace(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("t_seconds,model_index\n")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        read_trace(tmp_path / "text.parquet")


def test_requests_are_ordered_by_their_starts(tmp_path: Path) -> None:
    shuffled = {name: values[::-1] for name, values in columns().items()}
    parquet.write_table(pa.table(shuffled), tmp_path / "t.parquet")
    trace, names = read_trace(tmp_path / "t.parquet")
    assert names is None and trace.models == 3 and trace.seconds == 300.0
    assert trace.start.tolist() == columns()["t_seconds"].tolist()
    assert trace.output.tolist() == list(range(30))


def test_models_may_be_named(tmp_path: Path) -> None:
    trace = one_page_trace([np.arange(15) * 10.0, np.arange(15) * 11.0], 1)
    read, names = read_trace(write_parquet(tmp_path / "t.parquet", trace, ["zeta", "alpha"]))
    assert names == ("alpha", "zeta")
    assert read.model.tolist() == (1 - trace.model).tolist()


def test_windows_are_cut_by_start() -> None:
    trace = make_trace(*columns().values()).between(100.0, 155.0)
    assert trace.start.tolist() == [0, 10, 20, 30, 40, 50] and trace.output[0] == 10
    assert trace.seconds == 55.0 and trace.of_model(1).start.tolist() == [0.0, 30.0]


def test_drawn_requests_have_the_rates_and_lengths_asked_for() -> None:
    expected = [
        Expected(0.05, Lengths(800, 8000), Lengths(300, 1600)),
        Expected(0.02, Lengths(100, 100), Lengths(10, 20), burst=5.0),
        Expected(0.0, Lengths(1, 1), Lengths(1, 1)),
    ]
    trace = draw_trace(expected, 500.0, seed=1)
    assert trace.models == 3 and trace.seconds == 500 * HOUR
    for model, want in enumerate(expected):
        mine = trace.of_model(model)
        assert len(mine) == pytest.approx(want.rate * trace.seconds, rel=0.05)
    chat, bursts = trace.of_model(0), trace.of_model(1)
    assert np.quantile(chat.prompt, (0.5, 0.99)) == pytest.approx((800, 8000), rel=0.05)
    assert set(bursts.prompt.tolist()) == {100}
    # Of independent requests 5% come within 1 s of the last one; of bursts of five, most within a minute.
    assert (np.diff(chat.start) < 1).mean() == pytest.approx(0.05, abs=0.01)
    assert (np.diff(bursts.start) < 60).mean() > 0.75
    assert (
        draw_trace(expected, 5.0, seed=1).start.tolist() == draw_trace(expected, 5.0, seed=1).start.tolist()
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Lengths(0, 5), "median 0, p99 5"),
        (lambda: Lengths(9, 5), "median 9, p99 5"),
        (lambda: Expected(-1.0, Lengths(1, 1), Lengths(1, 1)), "not -1"),
        (lambda: Expected(1.0, Lengths(1, 1), Lengths(1, 1), burst=0.5), "not 0.5"),
        (lambda: draw_trace([Expected(1e4, Lengths(1, 1), Lengths(1, 1))], 24, 0), "864,000,000 requests"),
    ],
)
def test_what_cannot_be_expected(make: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        make()  # type: ignore[operator]
