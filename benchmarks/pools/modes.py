"""Ways to share two devices' memory among eight cold models, on the real engine: two pools (crosspool), a
model's weights and KV on one device with KV elastic among its models (monolithic), the same with all models
cut by tensor over both devices (sharded), and with a fixed share of KV for each model (static). Kernels,
admission and bytes for each device are equal.

    PYTHONPATH=src:benchmarks python benchmarks/pools/modes.py [--rates 8,16,32] [--to FOLDER]

Windows around bursts of long requests in zoo_longburst_8 are replayed at several rates: times are divided by
the rate, lengths by what the options say. Modes take turns window by window. Gaps between the tokens of a
request count as TBT whatever their cause: company, want of pages, preemption. Before that, at the first rate,
the windows without their bursts: low load.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet
from machine import describe
from pools.replay import Outcome, live_share, replay, summary

from crosspool.build.start import start_engine
from crosspool.core.config import MILLISECOND, EngineConfig, Mode, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.ids import Nanoseconds
from crosspool.core.topology import Sharding
from crosspool.demo.checkpoint import write_json, write_safetensors
from crosspool.demo.random_models import qwen3_moe_config, qwen3_moe_shapes, random_tensors
from crosspool.engine.engine import Engine

TRACE = Path(__file__).parent.parent / "data" / "zoo_longburst_8.parquet"
MODELS, VOCABULARY = 8, 8192
DEVICES = ("cpu:0", "cpu:1")
MODES = {
    "crosspool": (Mode.CROSSPOOL, Sharding.LAYER),
    "monolithic": (Mode.MONOLITHIC, Sharding.LAYER),
    "sharded": (Mode.MONOLITHIC, Sharding.TENSOR),
    "static": (Mode.STATIC, Sharding.LAYER),
}
BEFORE, AFTER = 20.0, 360.0
"""Seconds of the trace before a burst's first request, and from it on."""

SHAPE = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "max_position_embeddings": 65536,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""Of every model: 16 KiB of KV a token, 50 MB of experts, 25 MB of attention side."""

TOKEN_BYTES = 16384


@contextmanager
def checkpoints() -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(MODELS):
            path = Path(folder) / f"moe-{number}"
            path.mkdir()
            config = qwen3_moe_config({}) | SHAPE
            write_json(path / "config.json", config)
            write_safetensors(path / "model.safetensors", random_tensors(qwen3_moe_shapes(config), number))
            paths.append(path)
        yield paths


def build(paths: list[Path], name: str, options: argparse.Namespace) -> Engine:
    mode, sharding = MODES[name]
    kv, weights = (DEVICES[:1], DEVICES[1:]) if mode is Mode.CROSSPOOL else (DEVICES, DEVICES)
    return start_engine(
        EngineConfig(
            tuple(ModelConfig(path.name, str(path)) for path in paths),
            PoolConfig(device_bytes=options.device_mb * 10**6),
            SchedulerConfig(
                tbt_target=Nanoseconds(round(options.tbt_ms * MILLISECOND)), outgrowth_risk=options.risk
            ),
            kv_devices=kv,
            weights_devices=weights,
            sharding=sharding,
            threads=1,
            mode=mode,
        ),
        lambda _: None,
    )


def windows(count: int) -> list[dict[str, np.ndarray]]:
    """The trace around its bursts, those with fewest other requests first: they fit this machine."""
    table = pyarrow.parquet.read_table(TRACE)
    trace = {name: table[name].to_numpy() for name in table.column_names}
    times = trace["t_seconds"]
    bursts = times[trace["burst"] == 1]
    starts = bursts[np.flatnonzero(np.diff(bursts, prepend=-1e9) > 600)]
    parts = []
    for start in starts:
        part = (times >= start - BEFORE) & (times < start + AFTER)
        window = {name: values[part] for name, values in trace.items()}
        window["t_seconds"] = window["t_seconds"] - (start - BEFORE)
        others = int((window["burst"] == 0).sum())
        if others >= 20:
            parts.append((others, float(start), window))
    return [window for _, _, window in sorted(parts, key=lambda part: part[:2])[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="4,8,16,32")
    parser.add_argument("--bursts", type=int, default=2)
    parser.add_argument("--device-mb", type=int, default=410)
    parser.add_argument("--prompt-shrink", type=int, default=8)
    parser.add_argument("--output-shrink", type=int, default=2)
    parser.add_argument("--risk", type=float, default=0.5, help="outgrowth_risk; 1: no foresight")
    parser.add_argument("--tbt-ms", type=float, default=50.0)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    print(describe(), vars(options), flush=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with checkpoints() as paths:
        engines = {mode: build(paths, mode, options) for mode in MODES}
        shrink = (options.prompt_shrink, options.output_shrink)
        try:
            for mode, engine in engines.items():
                pool, longest = engine.info.kv_pool_bytes, engine.info.models[0].max_pool_tokens
                print(f"{mode:11} KV {pool / 1e6:.0f} MB, longest request {longest} tokens", flush=True)
            parts, numbers = windows(options.bursts), iter(range(1, 10**9))
            for engine in engines.values():
                replay(
                    engine, {name: values[:20] for name, values in parts[0].items()}, 1000.0, numbers, shrink
                )
            calm = [{name: values[part["burst"] == 0] for name, values in part.items()} for part in parts]
            rates = [float(rate) for rate in options.rates.split(",")]
            for load, rate in [("calm", rates[0]), *(("bursts", rate) for rate in rates)]:
                outcomes: dict[str, list[Outcome]] = {mode: [] for mode in MODES}
                for number, part in enumerate(calm if load == "calm" else parts):
                    order = list(MODES) if number % 2 else list(reversed(MODES))
                    for mode in order:
                        outcomes[mode].append(replay(engines[mode], part, rate, numbers, shrink))
                for mode, own in outcomes.items():
                    tokens = engines[mode].info.kv_pool_bytes / TOKEN_BYTES
                    result = summary(own) | {"live": live_share(own, tokens)}
                    results.setdefault(mode, {})[f"{load} {rate:g}"] = result
                    shown = "  ".join(f"{name} {value:.4g}" for name, value in result.items())
                    print(f"{load:6} rate {rate:5g} {mode:11} {shown}", flush=True)
        finally:
            for engine in engines.values():
                engine.close()
    if options.to is not None:
        options.to.mkdir(parents=True, exist_ok=True)
        (options.to / "modes.json").write_text(
            json.dumps({"machine": describe(), "options": {**vars(options), "to": None}, "results": results})
        )


if __name__ == "__main__":
    main()
