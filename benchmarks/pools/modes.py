"""Three ways to share two devices' memory among eight cold models, on the real engine: two pools
(crosspool), a model's weights and KV on one device with KV elastic among its models (monolithic), and the
same with a fixed share of KV for each model (static). Kernels, admission and bytes for each device are equal.

    PYTHONPATH=src:benchmarks python benchmarks/pools/modes.py [--rates 8,16,32] [--to FOLDER]

Windows around bursts of long requests in zoo_longburst_8 are replayed at several rates: times are divided by
the rate, lengths by what the options say. Modes take turns window by window. Gaps between the tokens of a
request count as TBT whatever their cause: company, want of pages, preemption. Before that, at the first rate,
the windows without their bursts: low load.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet
from machine import describe

from crosspool.build.start import start_engine
from crosspool.core.config import MILLISECOND, EngineConfig, Mode, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.errors import RequestTooLargeError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.demo.checkpoint import write_json, write_safetensors
from crosspool.demo.random_models import qwen3_moe_config, qwen3_moe_shapes, random_tensors
from crosspool.engine.engine import Engine

TRACE = Path(__file__).parent.parent / "data" / "zoo_longburst_8.parquet"
MODELS, VOCABULARY = 8, 8192
DEVICES = ("cpu:0", "cpu:1")
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


@dataclass
class Served:
    """One request: its arrival in seconds of the replay, and the times of its tokens."""

    arrival: float
    burst: bool
    prompt: int
    refused: bool = False
    tokens: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What a mode made of one window."""

    served: list[Served]
    held: list[tuple[float, float]]
    preemptions: int

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between tokens while the burst goes on: from its first arrival to its last token, or
        its last arrival if all of it was refused. Without a burst, all of them."""
        burst = [s for s in self.served if s.burst] or self.served
        begin, end = min(s.arrival for s in burst), max([s.arrival, *s.tokens][-1] for s in burst)
        return [
            1e3 * (b - a)
            for s in self.served
            for a, b in zip(s.tokens, s.tokens[1:], strict=False)
            if b > begin and a < end
        ]

    def live(self, pool_tokens: float) -> list[float]:
        """At each sample, the tokens of requests between their first and their last, over the tokens for
        which the devices have memory beside the weights."""
        return [
            sum(
                s.prompt + int(np.searchsorted(s.tokens, time))
                for s in self.served
                if s.tokens and s.tokens[0] <= time < s.tokens[-1]
            )
            / pool_tokens
            for time, _ in self.held
        ]

    @property
    def waits(self) -> list[float]:
        """Seconds to the first token."""
        return [s.tokens[0] - s.arrival for s in self.served if s.tokens]


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


def build(paths: list[Path], mode: Mode, options: argparse.Namespace) -> Engine:
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


def replay(
    engine: Engine,
    window: dict[str, np.ndarray],
    rate: float,
    numbers: Iterator[int],
    shrink: tuple[int, int],
) -> Outcome:
    rng = random.Random(1)
    requests: dict[int, Served] = {}
    held: list[tuple[float, float]] = []
    due = []
    for at, model, prompt, output, burst in zip(
        window["t_seconds"] / rate,
        window["model_index"],
        np.maximum(4, window["prompt_tokens"] // shrink[0]),
        np.maximum(2, window["output_tokens"] // shrink[1]),
        window["burst"],
        strict=True,
    ):
        number, length = next(numbers), int(output)
        tokens = tuple(rng.randrange(1, VOCABULARY) for _ in range(int(prompt)))
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        due.append(
            Request(
                RequestId(number),
                ModelIndex(int(model)),
                tokens,
                params,
                length,
                0,
                frozenset(),
                Nanoseconds(0),
            )
        )
        requests[number] = Served(float(at), bool(burst), len(tokens))
    before = sum(model.preemptions for model in engine.stats().models)
    begin, total = time.perf_counter(), engine.stats().kv_pages_total
    due.reverse()
    sampled = 0.0
    while due or engine.has_work():
        now = time.perf_counter() - begin
        while due and requests[due[-1].id].arrival <= now:
            request = due.pop()
            try:
                engine.add(request)
            except RequestTooLargeError:
                requests[request.id].refused = True
        for output in engine.step():
            at = time.perf_counter() - begin
            requests[output.request].tokens += [at] * len(output.token_ids)
        if now > sampled + 0.05:
            stats = engine.stats()
            held.append((now, 1 - (stats.kv_pages_free + stats.kv_pages_cached) / total))
            sampled = now
        wait = 0.05 if not due else min(0.05, max(0.0, requests[due[-1].id].arrival - now))
        engine.wait(wait)
    after = sum(model.preemptions for model in engine.stats().models)
    return Outcome(list(requests.values()), held, after - before)


def summary(outcomes: list[Outcome], pool_tokens: float) -> dict[str, float]:
    gaps = np.concatenate([outcome.gaps for outcome in outcomes])
    waits = np.concatenate([outcome.waits for outcome in outcomes])
    served = [s for outcome in outcomes for s in outcome.served]
    return {
        "p50": float(np.percentile(gaps, 50)),
        "p99": float(np.percentile(gaps, 99)),
        "max": float(gaps.max()),
        "ttft_p50": float(np.percentile(waits, 50)),
        "ttft_p99": float(np.percentile(waits, 99)),
        "refused": sum(s.refused for s in served),
        "requests": len(served),
        "preemptions": sum(outcome.preemptions for outcome in outcomes),
        "held": float(np.mean([share for outcome in outcomes for _, share in outcome.held])),
        "live": float(np.mean([share for outcome in outcomes for share in outcome.live(pool_tokens)])),
    }


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
        engines = {mode: build(paths, mode, options) for mode in Mode}
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
                outcomes: dict[Mode, list[Outcome]] = {mode: [] for mode in Mode}
                for number, part in enumerate(calm if load == "calm" else parts):
                    order = list(Mode) if number % 2 else list(reversed(Mode))
                    for mode in order:
                        outcomes[mode].append(replay(engines[mode], part, rate, numbers, shrink))
                for mode, own in outcomes.items():
                    result = summary(own, engines[mode].info.kv_pool_bytes / TOKEN_BYTES)
                    results.setdefault(str(mode), {})[f"{load} {rate:g}"] = result
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
