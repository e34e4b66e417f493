"""Ways to share the memory of many large devices among eight cold models, in virtual time: the real control
plane over the geometries of public models, and devices that read every prompt at 8,000 tokens a second and
make a token each 40 ms whatever else runs. So all that differs between modes is who has pages.

    PYTHONPATH=src:benchmarks python benchmarks/pools/modes_virtual.py [--rates 1,2,4,8] [--to FOLDER]

Every window around a burst of zoo_longburst_8 is replayed at each rate: times are divided by it. A gap
between two tokens of a request counts as TBT whatever its cause; a request's longest gap is what its reader
sees.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import describe
from pools.modes import AFTER, MODES, windows

from crosspool.build.pool_plan import plan_pools
from crosspool.core.config import EngineConfig, Mode, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.ids import ModelIndex
from crosspool.core.spec import ModelSpec
from crosspool.models.registry import read_spec
from crosspool.sim.fluid import Rates
from crosspool.sim.replay import ReplayResult, RequestRecord, replay
from crosspool.sim.workload import Trace

CONFIGS = Path(__file__).resolve().parents[2] / "src/crosspool/models/geometries"
KINDS = ("qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash")
MODELS = 8
LONGEST = 1 << 18
RATES = Rates()
Row = dict[str, float]


def specs() -> dict[ModelIndex, ModelSpec]:
    """Three kinds in turn. Their limits of context are lifted: the trace is of other models."""
    kinds = [replace(read_spec(CONFIGS / name), max_context=LONGEST) for name in KINDS]
    return {ModelIndex(index): kinds[index % len(kinds)] for index in range(MODELS)}


def config_of(name: str, models: Mapping[ModelIndex, ModelSpec], options: argparse.Namespace) -> EngineConfig:
    """Two pools keep as few devices for weights as hold them."""
    mode, sharding = MODES[name]
    devices = tuple(f"cpu:{n}" for n in range(options.devices))
    size = round(options.device_gb * 1e9)
    needed = -(-sum(spec.total_ffn_bytes for spec in models.values()) // size)
    kv, weights = (devices[needed:], devices[:needed]) if mode is Mode.CROSSPOOL else (devices, devices)
    return EngineConfig(
        tuple(ModelConfig(f"{KINDS[index % len(KINDS)]}-{index}", "nowhere") for index in models),
        PoolConfig(device_bytes=size, spill_bytes=0),
        SchedulerConfig(
            max_batch_rows=1024, max_waiting=1 << 20, max_running=1 << 20, outgrowth_risk=options.risk
        ),
        kv_devices=kv,
        weights_devices=weights,
        sharding=sharding,
        mode=mode,
    )


def trace_of(window: Mapping[str, np.ndarray[Any, Any]], rate: float, output_times: float) -> Trace:
    return Trace(
        window["t_seconds"] / rate,
        window["model_index"].astype(np.int64),
        window["prompt_tokens"].astype(np.int64),
        np.maximum(1, np.round(window["output_tokens"] * output_times)).astype(np.int64),
    )


def gaps_of(record: RequestRecord) -> list[float]:
    """In seconds."""
    return [pause / 1e9 for pause in record.pauses] + [RATES.tbt / 1e9] * (
        record.tokens - 1 - len(record.pauses)
    )


def summary(results: list[ReplayResult]) -> Row:
    records = [record for result in results for record in result.records]
    served = [record for record in records if not record.refused]
    waits = np.array([record.first_token - record.arrival for record in served]) / 1e9
    gaps = np.concatenate([gaps_of(record) for record in served])
    longest = [max(gaps_of(record)) for record in served if record.tokens > 1]
    return {
        "requests": len(records),
        "refused": len(records) - len(served),
        "ttft_p50": float(np.percentile(waits, 50)),
        "ttft_p99": float(np.percentile(waits, 99)),
        "tbt_p99": float(np.percentile(gaps, 99)),
        "tbt_p99.9": float(np.percentile(gaps, 99.9)),
        "longest_p99": float(np.percentile(longest, 99)),
        "preemptions": sum(result.preemptions for result in results),
        "live": float(np.mean([np.mean(result.live) / result.pool_bytes for result in results])),
    }


def plot(rows: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    """The curves over rates: waits for the first token, and the longest gap that a reader sees."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {"ttft_p99": "P99 TTFT, s", "longest_p99": "P99 of requests' longest gaps, s"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, own in rows.items():
            axes.plot([float(rate) for rate in own], [row[key] for row in own.values()], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="rate, times the trace's", title=title)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="1,2,4,8")
    parser.add_argument("--bursts", type=int, default=100)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--device-gb", type=float, default=141.0)
    parser.add_argument("--risk", type=float, default=SchedulerConfig().outgrowth_risk)
    parser.add_argument("--output-times", type=float, default=1.0, help="outputs so many times as long")
    parser.add_argument("--tick", type=float, default=0.02, help="seconds of virtual time in one engine step")
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    print(describe(), vars(options), flush=True)
    models, parts = specs(), windows(options.bursts)
    print(f"{len(parts)} windows of up to {AFTER:.0f} s after a burst begins", flush=True)
    rows: dict[str, dict[str, Row]] = {}
    for name in MODES:
        config = config_of(name, models, options)
        plan = plan_pools(config, models, 2 * options.devices * round(options.device_gb * 1e9))
        print(
            f"{name:11} KV {plan.kv_pool_bytes / 1e9:.0f} GB on {len(config.kv_devices)} devices", flush=True
        )
        for rate in options.rates.split(","):
            traces = [trace_of(part, float(rate), options.output_times) for part in parts]
            row = summary([replay(trace, config, models, plan, RATES, tick=options.tick) for trace in traces])
            rows.setdefault(name, {})[rate] = row
            shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
            print(f"rate {rate:>4} {name:11} {shown}", flush=True)
    if options.to is not None:
        options.to.mkdir(parents=True, exist_ok=True)
        about = {"machine": describe(), "options": {**vars(options), "to": None}}
        (options.to / "modes_virtual.json").write_text(json.dumps({**about, "results": rows}))
        plot(rows, options.to / "modes_virtual.png")


if __name__ == "__main__":
    main()
