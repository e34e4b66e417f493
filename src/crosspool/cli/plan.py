"""``crosspool plan``: how large the KV pool of a zoo has to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from crosspool.cli import plan_options as opt
from crosspool.cli.options import Json
from crosspool.core.config import WEIGHTS_DTYPES
from crosspool.core.errors import ConfigError, CrossPoolError

if TYPE_CHECKING:
    from crosspool.planner.plan import Plan
    from crosspool.planner.sizing import ZooModel
    from crosspool.planner.trace import Trace


def plan(
    models: opt.Models = None,
    trace: opt.TraceFile = None,
    workload: opt.WorkloadFile = None,
    weights_dtype: opt.WeightsDtype = "auto",
    tbt_ms: opt.TbtMs = 40.0,
    prefill_tps: opt.PrefillTps = 8000.0,
    risk: opt.Risk = 0.001,
    confidence: opt.Confidence = 0.9,
    fit_hours: opt.FitHours = None,
    since: opt.Since = None,
    device_memory: opt.DeviceMemory = "80GiB",  # type: ignore[assignment]
    page_bytes: opt.PageBytes = None,
    seed: opt.Seed = 0,
    save: opt.Save = None,
    plot: opt.Plot = None,
    as_json: Json = False,
) -> None:
    """Say how many bytes of KV a zoo of models needs, so that few requests wait.

    From a trace of a day, with three models taken in turn:

        crosspool plan --models Qwen3-30B-A3B,DeepSeek-V2-Lite,GLM-4.7-Flash --trace day.parquet

    From rates and lengths, then serve with what was planned:

        crosspool plan --workload zoo.toml --save plan.json

        crosspool serve models/qwen3 models/glm --kv-pool plan --plan plan.json
    """
    from crosspool.cli.plan_plot import check_plan_plot, write_plan_plot
    from crosspool.planner.demand import Pace
    from crosspool.planner.plan import PlanOptions, make_plan
    from crosspool.planner.plan_file import write_plan_file

    options = PlanOptions(
        pace=Pace(prefill_tps, tbt_ms / 1000),
        risk=risk,
        confidence=confidence,
        fit_hours=fit_hours,
        device_memory=device_memory,
        page_bytes=page_bytes,
        observed=_observed(since or []),
        seed=seed,
    )
    for path in (save, plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent}")
    if plot is not None:
        check_plan_plot(plot)
    if weights_dtype not in WEIGHTS_DTYPES:
        raise ConfigError(f"--weights-dtype must be {', '.join(WEIGHTS_DTYPES)}, not {weights_dtype!r}")
    zoo, requests = _find_zoo(models, trace, workload, weights_dtype, seed)
    made = make_plan(zoo, requests, options)
    _print(made, as_json)
    try:
        if save is not None:
            write_plan_file(made.as_dict(), save)
        if plot is not None:
            write_plan_plot(made, plot)
    except OSError as error:
        raise CrossPoolError(f"cannot write {error.filename}: {error.strerror}") from error


def _observed(since: Sequence[str]) -> dict[str, float]:
    hours = {}
    for text in since:
        name, equals, number = text.rpartition("=")
        try:
            hours[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--since must be like MODEL=HOURS, not {text!r}")
    return hours


def _find_zoo(
    models: str | None, trace: Path | None, workload: Path | None, weights_dtype: str, seed: int
) -> tuple[list[ZooModel], Trace]:
    """The models, one for each index of the trace or more."""
    if (trace is None) == (workload is None):
        raise ConfigError("give --trace FILE or --workload FILE (see crosspool plan --help)")
    if workload is not None:
        if models is not None:
            raise ConfigError("--models goes with --trace; a workload file names its own models")
        return _read_workload(workload, weights_dtype, seed)
    assert trace is not None
    return _read_trace(models, trace, weights_dtype)


def _read_workload(path: Path, weights_dtype: str, seed: int) -> tuple[list[ZooModel], Trace]:
    from crosspool.cli.geometries import find_spec
    from crosspool.cli.workload_file import read_workload_file
    from crosspool.planner.sizing import ZooModel
    from crosspool.planner.workload import draw_trace

    read = read_workload_file(path)
    zoo = []
    for model in read.models:
        name, spec = find_spec(model.place, path.absolute().parent, weights_dtype)
        zoo.append(ZooModel(model.name or name, spec))
    names = [model.name for model in zoo]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: two models are called {twice!r}: give one another name")
    return zoo, draw_trace([model.expected for model in read.models], read.hours, seed)


def _read_trace(models: str | None, path: Path, weights_dtype: str) -> tuple[list[ZooModel], Trace]:
    from dataclasses import replace

    from crosspool.cli.geometries import find_spec
    from crosspool.planner.sizing import ZooModel
    from crosspool.planner.trace import read_trace

    trace, names = read_trace(path)
    places = [place.strip() for place in models.split(",")] if models is not None else list(names or ())
    if not places:
        raise ConfigError(f"--models is needed: {path} numbers its models and does not name them")
    found = [find_spec(place, Path.cwd(), weights_dtype) for place in places]
    count = max(trace.models, len(found))
    zoo = []
    for index in range(count):
        name, spec = found[index % len(found)]
        turn = sum(other == name for other, _ in (found[i % len(found)] for i in range(index)))
        zoo.append(ZooModel(f"{name}#{turn + 1}" if _is_repeated(name, found, count) else name, spec))
    return zoo, replace(trace, models=count)


def _is_repeated(name: str, found: Sequence[tuple[str, object]], count: int) -> bool:
    return sum(found[index % len(found)][0] == name for index in range(count)) > 1


def _print(made: Plan, as_json: bool) -> None:
    from crosspool.cli.plan_report import print_plan
    from crosspool.cli.tables import output_console

    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_plan(output_console(), made)
