"""A plan: how many bytes of KV a zoo needs for a stated risk, and what that means in devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosspool.core.errors import ConfigError
from crosspool.core.kv_layout import KvLayout, choose_page_bytes, make_layout
from crosspool.planner.baselines import find_baselines
from crosspool.planner.clusters import LONGEST
from crosspool.planner.conformal import Calibration, past_windows
from crosspool.planner.demand import Pace
from crosspool.planner.estimate import estimate
from crosspool.planner.history import Geometry, History, make_history
from crosspool.planner.plan_file import FORMAT
from crosspool.planner.quantiles import within
from crosspool.planner.sizing import KvBytes, Mode, Pools, ZooModel, monolithic, pool_devices, pooled, static
from crosspool.planner.trace import HOUR, Floats, Trace

SHARES = (0.5, 0.9, 0.99, 0.999)
INTERVAL = (0.05, 0.95)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """``risk``: the share of requests that may wait. ``confidence``: how probably the next window is within
    it. ``fit_hours``: how much of the trace's end is fitted (None: all). ``observed``: by model, for how many
    hours it has been there, where that is less."""

    pace: Pace = field(default_factory=Pace)
    risk: float = 0.001
    confidence: float = 0.90
    fit_hours: float | None = None
    device_memory: int = 80 << 30
    page_bytes: int | None = None
    observed: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("risk", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        for name, value in (
            ("prefill_tps", self.pace.prefill_tps),
            ("tbt_ms", 1000 * self.pace.tbt),
            ("fit_hours", self.fit_hours),
            ("device_memory", self.device_memory),
            *((f"hours of {model}", hours) for model, hours in self.observed.items()),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be above 0, not {value:g}")


@dataclass(frozen=True, slots=True)
class Quantile:
    """Bytes that a share stays within: as ``seen``, and as ``estimated`` with a 90% interval of the draws."""

    share: float
    seen: float
    estimated: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """``within`` of ``windows`` past windows of ``hours`` would have been within the risk; ``factor`` is what
    the estimate is scaled by."""

    windows: int
    within: int
    hours: float
    factor: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes. ``interval``: where the need of the next window lies in 9 of 10 cases."""

    models: tuple[ZooModel, ...]
    options: PlanOptions
    trace: Trace
    fitted_hours: float
    page_bytes: int
    kv_pool_bytes: int
    interval: tuple[float, float]
    by_time: tuple[Quantile, ...]
    by_request: tuple[Quantile, ...]
    coverage: Coverage
    baselines: dict[str, float]
    most_running: int
    pools: Pools
    modes: dict[str, Mode]
    history: History = field(repr=False)

    @property
    def weights_pool_bytes(self) -> int:
        return sum(model.spec.total_ffn_bytes for model in self.models)

    @property
    def attention_bytes(self) -> int:
        """Of all attention sides, which every KV device holds."""
        return sum(model.spec.attention_side_bytes for model in self.models)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {
            "format": FORMAT,
            "models": [model.name for model in self.models],
            "kv_pool_bytes": self.kv_pool_bytes,
            "interval": list(self.interval),
            "weights_pool_bytes": self.weights_pool_bytes,
            "attention_bytes": self.attention_bytes,
            "page_bytes": self.page_bytes,
            "risk": self.options.risk,
            "confidence": self.options.confidence,
            "quantiles": {
                "by_time": [asdict(quantile) for quantile in self.by_time],
                "by_request": [asdict(quantile) for quantile in self.by_request],
            },
            "sum_of_peaks_bytes": self.baselines["sum_of_peaks"],
            "baselines": self.baselines,
            "coverage": asdict(self.coverage),
            "devices": {"memory_bytes": self.options.device_memory, **asdict(self.pools)},
            "modes": {name: asdict(mode) for name, mode in self.modes.items()},
            "admission": {
                "risk": self.options.risk,
                "max_running": self.most_running,
                "tbt_target_ms": 1000 * self.options.pace.tbt,
            },
            "trace": {
                "requests": len(self.trace),
                "hours": self.trace.hours,
                "models": self.trace.models,
                "fitted_hours": self.fitted_hours,
                "prefill_tps": self.options.pace.prefill_tps,
                "tbt_ms": 1000 * self.options.pace.tbt,
            },
        }


def make_plan(models: Sequence[ZooModel], trace: Trace, options: PlanOptions) -> Plan:
    """A plan for models of which a trace tells the past: ``trace.model`` is the place in ``models``.

    Raises ConfigError for options that cannot work with this trace.
    """
    page_bytes = options.page_bytes or choose_page_bytes(model.spec for model in models)
    layouts = [make_layout(model.spec, page_bytes) for model in models]
    history = make_history(trace, _geometries(models, layouts), options.pace)
    begin = _begin(trace, options.fit_hours)
    fitted_hours = (trace.seconds - begin) / HOUR
    window = history.window(begin, trace.seconds, _observed(models, fitted_hours, options.observed))
    shares = sorted({*SHARES, 1 - options.risk})
    found = estimate(window, shares, seed=options.seed)
    calibration = Calibration(tuple(past_windows(history, fitted_hours, options.risk, trace.seconds)))
    factor = calibration.factor(options.confidence)
    upper = float(found.upper()[shares.index(1 - options.risk)])
    kv_bytes = _whole_pages(upper * factor, page_bytes, layouts)
    alone = history.alone(begin, trace.seconds)

    def need(some: NDArray[np.bool_]) -> float:
        return factor * alone.need(some, 1 - options.risk)

    levels, total = history.levels(begin, trace.seconds), history.demand.total
    pools = pool_devices(models, kv_bytes, options.device_memory)
    return Plan(
        models=tuple(models),
        options=options,
        trace=trace,
        fitted_hours=fitted_hours,
        page_bytes=page_bytes,
        kv_pool_bytes=kv_bytes,
        interval=(upper * calibration.factor(INTERVAL[0]), upper * calibration.factor(INTERVAL[1])),
        by_time=_quantiles(shares, total[round(begin / history.cells.seconds) :], found.by_time),
        by_request=_quantiles(shares, levels, found.by_request),
        coverage=_coverage(calibration, options.confidence, factor),
        baselines=find_baselines(history, begin, trace.seconds, options.risk, options.seed).as_dict(),
        most_running=ceil(_most_alive(history, begin) * max(1.0, factor)),
        pools=pools,
        modes=_modes(models, layouts, kv_bytes, pools, options, need),
        history=history,
    )


def _geometries(models: Sequence[ZooModel], layouts: Sequence[KvLayout]) -> list[Geometry]:
    return [
        Geometry(layout, model.spec.kv_bytes_per_token) for model, layout in zip(models, layouts, strict=True)
    ]


def _begin(trace: Trace, fit_hours: float | None) -> float:
    """Where the fitted window begins: at a half hour, where clusters do."""
    if fit_hours is None:
        return 0.0
    if fit_hours > trace.hours * (1 + 1e-6):
        raise ConfigError(f"fit_hours is {fit_hours:g}, but the trace has {trace.hours:.3g} hours")
    return max(0.0, (trace.seconds - fit_hours * HOUR) // LONGEST * LONGEST)


def _observed(models: Sequence[ZooModel], hours: float, observed: Mapping[str, float]) -> Floats:
    unknown = sorted(set(observed) - {model.name for model in models})
    if unknown:
        known = ", ".join(model.name for model in models)
        raise ConfigError(f"hours are given for {', '.join(unknown)}, but the models are {known}")
    return np.array([observed.get(model.name, hours) for model in models])


def _whole_pages(wanted: float, page_bytes: int, layouts: Sequence[KvLayout]) -> int:
    """At least what the shortest sequence of every model needs."""
    least = max(len(layout.groups) for layout in layouts)
    return max(least, ceil(wanted / page_bytes)) * page_bytes


def _quantiles(shares: Sequence[float], seen: Floats, drawn: Floats) -> tuple[Quantile, ...]:
    low, middle, high = np.quantile(drawn, (INTERVAL[0], 0.5, INTERVAL[1]), axis=0)
    return tuple(
        Quantile(share, within(seen, share), float(middle[i]), float(low[i]), float(high[i]))
        for i, share in enumerate(shares)
    )


def _coverage(calibration: Calibration, confidence: float, factor: float) -> Coverage:
    held, windows = calibration.achieved(confidence)
    first = calibration.windows[0] if calibration.windows else None
    return Coverage(windows, held, 0.0 if first is None else (first.end - first.middle) / HOUR, factor)


def _most_alive(history: History, begin: float) -> int:
    """The most requests that held KV at once."""
    cells = history.cells
    ends = cells.first + cells.count
    change = np.bincount(cells.first, minlength=int(ends.max()) + 1) - np.bincount(ends)
    return int(np.cumsum(change)[int(begin / cells.seconds) :].max())


def _modes(
    models: Sequence[ZooModel],
    layouts: Sequence[KvLayout],
    kv_bytes: int,
    pools: Pools,
    options: PlanOptions,
    need: KvBytes,
) -> dict[str, Mode]:
    return {
        "crosspool": pooled(models, layouts, kv_bytes, pools),
        "static": static(models, layouts, options.device_memory, need),
        "monolithic": monolithic(models, layouts, options.device_memory, need),
    }
