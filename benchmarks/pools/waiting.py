"""Share of requests that wait for pages over 1 s, in a KV pool of the true P99.9 of what the trace demands.

The real engine, scheduler and KV pool in virtual time: every prompt is read at 8,000 tokens a second,
and every sequence makes a token each 40 ms, whatever else runs. Baselines reserve pages of prompt and output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import describe
from pools.reservations import reservation_waits

from crosspool.build.pool_plan import PoolPlan
from crosspool.core.config import SECOND, EngineConfig, ModelConfig, SchedulerConfig
from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import ModelIndex, Nanoseconds
from crosspool.core.kv_layout import choose_page_bytes, make_layout
from crosspool.core.spec import ModelSpec
from crosspool.models.registry import read_spec
from crosspool.scheduler.sequence import Wait
from crosspool.sim.fluid import Rates
from crosspool.sim.open_loop import open_loop_demand
from crosspool.sim.replay import ReplayResult, replay
from crosspool.sim.workload import HOUR, read_trace

CONFIGS = Path(__file__).resolve().parents[2] / "src/crosspool/models/geometries"
MODELS = ("qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash")
LONGEST = 1 << 18
"""The trace's models are not these three: what is taken from these is their KV, not the limit of context."""
RATES = Rates(8000.0, Nanoseconds(40_000_000))


@dataclass(frozen=True)
class World:
    """The trace's models and how they lie in pages, in the order of the trace's numbers."""

    config: EngineConfig
    specs: dict[ModelIndex, ModelSpec]
    page_bytes: int

    def plan(self, pages: int, spill_pages: int = 0) -> PoolPlan:
        layouts = {model: make_layout(spec, self.page_bytes) for model, spec in self.specs.items()}
        return PoolPlan(self.page_bytes, DevicePages.of([pages]), 1, layouts, {}, spill_pages)


def make_world(models: int, scheduler: SchedulerConfig) -> World:
    kinds = [replace(read_spec(CONFIGS / name), max_context=LONGEST) for name in MODELS]
    specs = {ModelIndex(index): kinds[index % len(kinds)] for index in range(models)}
    config = EngineConfig(
        tuple(ModelConfig(f"{MODELS[i % len(MODELS)]}-{i}", "nowhere") for i in specs), scheduler=scheduler
    )
    return World(config, specs, choose_page_bytes(kinds))


def summary(result: ReplayResult) -> dict[str, object]:
    records = result.records
    ttft = np.array([record.first_token - record.arrival for record in records]) / 1e9
    pauses = np.array([pause for record in records for pause in record.pauses]) / 1e9
    gaps = sum(record.tokens - 1 for record in records)
    waits = {why: np.array([record.waits.get(why, 0) for record in records]) / 1e9 for why in Wait}
    return {
        "share_waiting_over_1s": round(result.share_waiting(), 6),
        "requests_waiting_over_1s": sum(record.waited > SECOND for record in records),
        "by_cause": {
            str(why): {
                "requests": int((w > 0).sum()),
                "over_1s": int((w > 1).sum()),
                "max_s": round(w.max(), 2),
            }
            for why, w in waits.items()
        },
        "preemptions": result.preemptions,
        "spills": result.spills,
        "spilled_gib": round(result.spilled_bytes / 2**30, 2),
        "returned_gib": round(result.returned_bytes / 2**30, 2),
        "ttft_s": {f"p{q}": round(float(np.percentile(ttft, q)), 3) for q in (50, 99, 99.9)},
        "tbt_over_40ms": {
            "gaps": len(pauses),
            "share": round(len(pauses) / max(1, gaps), 8),
            "over_1s": int((pauses > 1).sum()),
            "total_s": round(float(pauses.sum()), 1),
            "max_s": round(float(pauses.max(initial=0.0)), 2),
        },
        "memory": {
            "live_over_pool": round(float(np.mean(result.live)) / result.pool_bytes, 4),
            "held_over_pool": round(float(np.mean(result.held)) / result.pool_bytes, 4),
            "waste_of_held": round(1 - float(np.sum(result.live)) / float(np.sum(result.held)), 4),
        },
        "engine_steps": result.steps,
    }


def longest_of(prompt: int, output: int) -> int:
    """What clients ask for: room that is seldom used up."""
    return max(output, 32_768)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--start-hour", type=float, help="by default the window with most requests")
    parser.add_argument("--pool-gib", type=float, help="instead of the window's true quantile")
    parser.add_argument("--quantile", type=float, default=0.999)
    parser.add_argument("--spill-gib", type=float, default=0.0, help="host memory for preempted sequences")
    parser.add_argument("--prefill", type=float, default=RATES.prefill_tokens_per_second)
    parser.add_argument("--copy-gb", type=float, default=10.0, help="GB copied in a second to it and back")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--decode-steps", type=int, default=32)
    parser.add_argument("--lengths-known", action="store_true")
    parser.add_argument("--risk", type=float, default=SchedulerConfig().outgrowth_risk)
    parser.add_argument("--tick", type=float, default=0.02, help="seconds of virtual time in one engine step")
    parser.add_argument("--no-replay", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    whole = read_trace(options.trace)
    seconds = options.hours * HOUR
    start = whole.busiest(seconds) if options.start_hour is None else options.start_hour * HOUR
    trace = whole.window(start, seconds)
    world = make_world(
        trace.num_models,
        SchedulerConfig(
            max_chunk_tokens=options.chunk,
            max_batch_rows=1024,
            decode_steps=options.decode_steps,
            max_waiting=1 << 20,
            max_running=1 << 20,
            outgrowth_risk=options.risk,
        ),
    )
    layouts = list(world.plan(0).layouts.values())
    rates = Rates(options.prefill, RATES.tbt, options.copy_gb * 1e9)
    demand = open_loop_demand(trace, layouts, rates)
    gib = world.page_bytes / 2**30
    pages = demand.quantile(options.quantile, seconds)
    if options.pool_gib is not None:
        pages = int(options.pool_gib / gib)
    result: dict[str, object] = {
        "machine": describe(),
        "trace": options.trace.name,
        "window_hours": [start / HOUR, (start + seconds) / HOUR],
        "requests": len(trace),
        "prompt_tokens": int(trace.prompts.sum()),
        "output_tokens": int(trace.outputs.sum()),
        "page_bytes": world.page_bytes,
        "tokens_per_page": [layout.tokens_per_page for layout in layouts[:3]],
        "groups": [len(layout.groups) for layout in layouts[:3]],
        "pool_pages": pages,
        "pool_gib": round(pages * gib, 2),
        "most_gib": round(int(demand.pages.max()) * gib, 2),
    }
    for name, per_model in (("one_line_reserving", False), ("line_per_model_reserving", True)):
        waits = reservation_waits(trace, layouts, rates, pages, line_per_model=per_model)
        result[name] = {
            "share_waiting_over_1s": round(float((waits > 1).mean()), 6),
            "max_s": waits.max().round(1),
        }
    if not options.no_replay:
        began = time.monotonic()
        known = (lambda prompt, output: output) if options.lengths_known else longest_of
        served = replay(
            trace,
            world.config,
            world.specs,
            world.plan(pages, int(options.spill_gib / gib)),
            rates,
            most_tokens=known,
            tick=options.tick,
        )
        result["crosspool"] = summary(served) | {"replay_seconds": round(time.monotonic() - began, 1)}
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
