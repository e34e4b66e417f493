"""A picture of a measurement: how TTFT and TBT are distributed, and output tokens over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crosspool.bench.client import Record
from crosspool.bench.run import Measurement
from crosspool.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (15.0, 4.5)
BINS = 60
LEAST_MS, MARGIN = 0.01, 1.1
FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ConfigError if no plot could be written there: better before a long measurement than after."""
    if find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib; install it with: pip install 'crosspool[bench]'")
    if path.suffix not in FORMATS:
        raise ConfigError(f"a plot's name ends with one of {', '.join(FORMATS)}, not as {path.name!r} does")


def write_plot(measurement: Measurement, path: Path) -> None:
    """Write the picture; the ending of ``path`` says in which format. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    ttft, tbt, rate = figure.subplots(1, 3)
    records = {model: measurement.of(model) for model in measurement.dialects}
    _plot_shares(ttft, {model: _ttft_ms(some) for model, some in records.items()})
    _plot_shares(tbt, {model: _tbt_ms(some) for model, some in records.items()})
    for model, some in records.items():
        _plot_rate(rate, model, some, measurement)
    ttft.set(title="Time to first token", xlabel="ms", ylabel="share of requests")
    tbt.set(title="Time between tokens", xlabel="ms", ylabel="share of gaps")
    rate.set(title="Output", xlabel="s", ylabel="tokens per second", ylim=(0, None))
    for axes in (ttft, tbt, rate):
        axes.grid(alpha=0.3)
    rate.legend()
    figure.savefig(path)


def _ttft_ms(records: Sequence[Record]) -> list[float]:
    return [1000 * (record.events[0] - record.due) for record in records if record.events]


def _tbt_ms(records: Sequence[Record]) -> list[float]:
    return [1000 * gap for record in records for gap in record.gaps]


def _plot_shares(axes: Axes, by_model: Mapping[str, Sequence[float]]) -> None:
    """Which share of the values is at most so large. What is less than LEAST_MS is drawn there."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    every = [LEAST_MS if value < LEAST_MS else value for values in by_model.values() for value in values]
    axes.set_xlim(min(every, default=1.0) / MARGIN, max(every, default=1.0) * MARGIN)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    for model, values in by_model.items():
        ordered = np.maximum(np.sort(values), LEAST_MS)
        steps = np.concatenate((ordered[:1], ordered))
        axes.step(steps, np.arange(len(steps)) / max(len(values), 1), where="post", label=model)


def _plot_rate(axes: Axes, model: str, records: Sequence[Record], measurement: Measurement) -> None:
    """An event counts for the tokens that its request had in the mean of its events."""
    times = [event - measurement.begin for record in records for event in record.events]
    tokens = [record.tokens / len(record.events) for record in records for _ in record.events]
    edges = np.linspace(0, max(measurement.seconds, 1e-9), BINS + 1)
    counts, _ = np.histogram(times, edges, weights=tokens)
    axes.plot((edges[:-1] + edges[1:]) / 2, counts / np.diff(edges), label=model)
