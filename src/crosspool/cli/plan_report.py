"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from crosspool.cli.sizes import format_bytes
from crosspool.cli.tables import print_table
from crosspool.planner.demand import UNBOUNDED
from crosspool.planner.plan import Plan, Quantile
from crosspool.planner.sizing import Mode

MODES = {
    "crosspool": "two pools (CrossPool)",
    "static": "static partition",
    "monolithic": "monolithic, elastic KV",
}
BASELINES = {
    "monte_carlo": "Monte Carlo, independent requests",
    "chernoff": "Chernoff bound of the same",
    "empirical": "quantile seen by requests",
    "maximum": "most ever held at once",
    "sum_of_peaks": "sum of the models' peaks",
}


def print_plan(console: Console, plan: Plan) -> None:
    """Print what to provide, what it rests on, and what other ways would need."""
    trace, options = plan.trace, plan.options
    about = f"{len(trace):,} requests of {trace.models} models in {trace.hours:,.1f} h"
    print_table(console, f"Plan from {about}, fitted on {plan.fitted_hours:,.1f} h", ("", ""), _pools(plan))
    shares = zip(plan.by_time, plan.by_request, strict=True)
    rows = [(f"{100 * time.share:g}%", *_cells(time), *_cells(request)) for time, request in shares]
    columns = ("share", "of time: seen", "estimated (90%)", "of requests: seen", "estimated (90%)")
    print_table(console, "Demand for KV that so large a share stays within", columns, rows)
    memory = format_bytes(options.device_memory)
    columns = ("", "KV", "weights", f"devices of {memory}", "largest context (least of all models)")
    modes = [(MODES[name], *_mode(mode)) for name, mode in plan.modes.items()]
    print_table(console, "Ways to place it", columns, modes)
    by_model = ("model", "longest sequence it knows", *(MODES[name] for name in plan.modes))
    print_table(console, "Largest context of one request, in tokens, by its KV", by_model, _contexts(plan))
    baselines = [(BASELINES[name], format_bytes(round(value))) for name, value in plan.baselines.items()]
    print_table(console, "Other estimates of the KV", ("", ""), baselines)


def _pools(plan: Plan) -> Iterator[tuple[str, str]]:
    options, coverage, pools = plan.options, plan.coverage, plan.pools
    low, high = (format_bytes(round(value)) for value in plan.interval)
    yield "KV pool", f"{format_bytes(plan.kv_pool_bytes)} (--kv-pool-bytes {plan.kv_pool_bytes})"
    yield "need of the next window, 90%", f"{low} to {high}"
    yield (
        "goal",
        (f"at most {100 * options.risk:g}% of requests wait, in {100 * options.confidence:g}% of windows"),
    )
    if coverage.windows:
        yield (
            "past windows within the goal",
            (f"{coverage.within} of {coverage.windows}, of {coverage.hours:g} h each"),
        )
    else:
        yield "past windows within the goal", "none: the trace is too short for any"
    yield "factor on the estimate", f"{coverage.factor:.2f}"
    yield "weights pool", format_bytes(plan.weights_pool_bytes)
    yield "attention sides, on each KV device", format_bytes(plan.attention_bytes)
    yield "devices", f"{pools.kv_devices} for KV, {pools.weights_devices} for weights"
    yield "sequences that run at once, at most", f"{plan.most_running:,}"


def _cells(quantile: Quantile) -> tuple[str, str]:
    low, middle, high = (
        format_bytes(round(value)) for value in (quantile.low, quantile.estimated, quantile.high)
    )
    return format_bytes(round(quantile.seen)), f"{middle} ({low} to {high})"


def _mode(mode: Mode) -> tuple[str, str, str, str]:
    name, tokens = min(mode.largest_context.items(), key=lambda item: item[1])
    sizes = format_bytes(mode.kv_bytes), format_bytes(mode.weights_bytes)
    return *sizes, str(mode.devices), f"{_tokens(tokens)} tokens ({name})"


def _contexts(plan: Plan) -> Iterator[tuple[str, ...]]:
    for model in plan.models:
        contexts = (mode.largest_context[model.name] for mode in plan.modes.values())
        yield model.name, f"{model.spec.max_context:,}", *map(_tokens, contexts)


def _tokens(tokens: int) -> str:
    return "any" if tokens >= UNBOUNDED else f"{tokens:,}"
