"""A picture of a plan: demand over time beside the pool, its quantiles, and what other ways would provide."""

from __future__ import annotations

import html
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crosspool.cli.plan_report import BASELINES, print_plan
from crosspool.core.errors import ConfigError
from crosspool.planner.plan import Plan
from crosspool.planner.trace import HOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf", ".html")
INCHES = (16.0, 4.8)
POINTS = 1500
GIB = 1 << 30


def check_plan_plot(path: Path) -> None:
    """Raises ConfigError if no plot could be written there."""
    if find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib; install it with: pip install 'crosspool[bench]'")
    if path.suffix not in FORMATS:
        raise ConfigError(f"a plot's name ends with one of {', '.join(FORMATS)}, not as {path.name!r} does")


def write_plan_plot(plan: Plan, path: Path) -> None:
    """Write the picture; the ending of ``path`` says in which format. A page of HTML has the tables too.

    Raises OSError.
    """
    figure = _draw(plan)
    if path.suffix != ".html":
        figure.savefig(path)
        return
    drawing = StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    path.write_text(
        "<!doctype html><meta charset='utf-8'><title>KV plan</title>\n"
        f"{svg[svg.index('<svg') :]}\n<pre>{html.escape(_tables(plan))}</pre>\n",
        encoding="utf-8",
    )


def _tables(plan: Plan) -> str:
    from rich.console import Console

    text = StringIO()
    print_plan(Console(file=text, width=200), plan)
    return text.getvalue()


def _draw(plan: Plan) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    over_time, quantiles, sizes = figure.subplots(1, 3, width_ratios=(2, 1.2, 1.3))
    _draw_demand(over_time, plan)
    _draw_quantiles(quantiles, plan)
    _draw_sizes(sizes, plan)
    return figure


def _draw_demand(axes: Axes, plan: Plan) -> None:
    demand = plan.history.demand
    step = max(1, len(demand.total) // POINTS)
    whole = demand.total[: len(demand.total) // step * step].reshape(-1, step).max(axis=1)
    axes.plot(np.arange(len(whole)) * step * demand.cell / HOUR, whole / GIB, linewidth=0.7, label="demand")
    axes.axhline(plan.kv_pool_bytes / GIB, color="C3", label="KV pool")
    axes.axhspan(plan.interval[0] / GIB, plan.interval[1] / GIB, color="C3", alpha=0.15, label="need, 90%")
    axes.set(title="Demand for KV", xlabel="hours", ylabel="GiB", ylim=(0, None))
    axes.legend()


def _draw_quantiles(axes: Axes, plan: Plan) -> None:
    for name, some, color in (("time", plan.by_time, "C0"), ("requests", plan.by_request, "C1")):
        beyond = [1 - quantile.share for quantile in some]
        axes.plot(beyond, [q.seen / GIB for q in some], "o", color=color, label=f"of {name}, seen")
        axes.plot(beyond, [q.estimated / GIB for q in some], color=color, label=f"of {name}, estimated")
        low, high = [q.low / GIB for q in some], [q.high / GIB for q in some]
        axes.fill_between(beyond, low, high, color=color, alpha=0.15)
    axes.set(title="How much is seldom needed", xlabel="share beyond", ylabel="GiB", xscale="log")
    axes.invert_xaxis()
    axes.legend()


def _draw_sizes(axes: Axes, plan: Plan) -> None:
    sizes = {BASELINES[name]: value for name, value in plan.baselines.items()}
    sizes["static partition"] = plan.modes["static"].kv_bytes
    sizes["monolithic, elastic KV"] = plan.modes["monolithic"].kv_bytes
    sizes["this plan"] = plan.kv_pool_bytes
    axes.barh(
        list(sizes), [value / GIB for value in sizes.values()], color=["C7"] * (len(sizes) - 1) + ["C3"]
    )
    axes.set(title="KV by other rules", xlabel="GiB")
