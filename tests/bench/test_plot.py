from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from crosspool.bench.client import Record
from crosspool.bench.dialect import Dialect, Fields, Prompt
from crosspool.bench.plot import check_plot, write_plot
from crosspool.bench.run import Measurement
from crosspool.core.errors import ConfigError
from helpers_load import small_load

pytestmark = pytest.mark.unit

BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_a_picture_of_a_load_where_one_model_gave_nothing(tmp_path: Path, suffix: str) -> None:
    dialect = Dialect(Prompt.TOKEN_IDS, Fields.EXACT)
    records = [Record("a", 3, 1.0, 1.0, [1.1, 1.1, 1.4], 1.5, 8, 3), Record("b", 3, 1.0, 1.0)]
    load = small_load("a", "b")
    path = tmp_path / f"plot{suffix}"
    check_plot(path)
    write_plot(Measurement("http://here", load, {"a": dialect, "b": dialect}, 1.0, 2.0, records), path)
    assert path.read_bytes().startswith(BEGINNINGS[suffix])
    if suffix == ".svg":
        assert all(f"<!-- {text} -->" in path.read_text() for text in ("a", "b", "Time between tokens"))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends with one of \.png"):
        check_plot(tmp_path / "plot.txt")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosspool.bench.plot.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'crosspool\[bench\]'"):
        check_plot(tmp_path / "plot.png")
    assert importlib.util.find_spec("matplotlib") is not None
