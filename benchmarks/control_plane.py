"""Python time of the control plane: per micro-batch with many models, and per page of the KV pool.

The executor here answers at once and for free, so what is measured is the engine's step alone: taking events,
admission, batching, page tables, due times, grants. Every micro-batch is one decode grant of one model.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import deque
from pathlib import Path

from machine import describe

from crosspool.build.control import assemble
from crosspool.build.pool_plan import PoolPlan
from crosspool.core.batch import Event, Grant, RetiredEvent, TokenEvent, row_after
from crosspool.core.config import EngineConfig, ModelConfig, SchedulerConfig
from crosspool.core.copies import PageCopy
from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.core.info import ModelInfo
from crosspool.core.kv_layout import choose_page_bytes, make_layout
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.core.spec import DType, FfnSpec, GqaSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec
from crosspool.engine.engine import Engine
from crosspool.pools.ffn import FfnPool
from crosspool.pools.kv import KvPool
from crosspool.pools.pages import PageAllocator
from crosspool.pools.prefix_cache import next_key

SPEC = ModelSpec(
    architecture="Qwen3MoeForCausalLM",
    hidden_size=2048,
    vocab_size=151_936,
    max_context=40_960,
    layers=(LayerSpec(FfnSpec(768, router=RouterSpec(128, 8, normalise=True))),) * 48,
    attention=GqaSpec(32, 4, 128, 128**-0.5, qk_norm=True),
    rope=RopeSpec(128, 1e6),
    norm_eps=1e-6,
    tied_embeddings=False,
    dtype=DType.BFLOAT16,
)


class InstantExecutor:
    """Gives back one grant's tokens at each poll, the oldest grant's first: models retire one by one."""

    def __init__(self) -> None:
        self._done: deque[list[Event]] = deque()
        self.grants = 0

    def submit(self, grant: Grant) -> None:
        self.grants += 1
        events: list[Event] = []
        for row in grant.rows:
            for made in range(1, row.steps + 1):
                finish, leaves = row_after(row, made, 7)
                events.append(TokenEvent(grant.id, row.request, 7, finish))
                if leaves:
                    break
        events.append(RetiredEvent(grant.id, (Nanoseconds(100_000), Nanoseconds(100_000))))
        self._done.append(events)

    def poll(self) -> list[Event]:
        return self._done.popleft() if self._done else []

    def copy(self, copy: PageCopy) -> None: ...

    def cancel(self, request: RequestId) -> None: ...

    def recall(self, grant: GrantId) -> None: ...

    def stream_to(self, pipe: int) -> None: ...

    def wait(self, timeout: float) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Ticks:
    """The process's monotonic clock."""

    def now(self) -> Nanoseconds:
        return Nanoseconds(time.monotonic_ns())


def make_engine(models: int, decode_steps: int) -> tuple[Engine, InstantExecutor]:
    specs = {ModelIndex(index): SPEC for index in range(models)}
    page_bytes = choose_page_bytes([SPEC])
    config = EngineConfig(
        tuple(ModelConfig(f"m{index}", "nowhere") for index in specs),
        scheduler=SchedulerConfig(decode_steps=decode_steps),
    )
    layout = make_layout(SPEC, page_bytes)
    layouts = {ModelIndex(index): layout for index in range(models)}
    plan = PoolPlan(page_bytes, DevicePages.of([100_000]), 1, layouts, {})
    infos = [ModelInfo(f"m{index}", index, "nowhere") for index in specs]
    executor = InstantExecutor()
    return assemble(config, infos, specs, plan, FfnPool(1), executor, Ticks()), executor


def per_micro_batch(models: int, sequences: int, decode_steps: int, seconds: float) -> dict[str, object]:
    """Microseconds of ``Engine.step`` per micro-batch while every sequence decodes."""
    engine, executor = make_engine(models, decode_steps)
    for identity in range(sequences):
        engine.add(
            Request(
                RequestId(identity),
                ModelIndex(identity % models),
                tuple(range(500)),
                SamplingParams(max_tokens=30_000),
                30_000,
                0,
                frozenset({2}),
                Nanoseconds(0),
            )
        )
    for _ in range(20 * models):
        engine.step()
    samples, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        grants, began = executor.grants, time.perf_counter()
        for _ in range(50):
            engine.step()
        samples.append((time.perf_counter() - began) / (executor.grants - grants) * 1e6)
    return {
        "models": models,
        "running_sequences": sequences,
        "rows_per_micro_batch": sequences / models,
        "decode_steps": decode_steps,
        "median_us": round(statistics.median(samples), 1),
        "p99_us": round(statistics.quantiles(samples, n=100)[98], 1),
        "samples": len(samples),
    }


def per_page(seconds: float) -> dict[str, object]:
    """Microseconds to allocate and free one page, one at a time and 32 at a time."""
    result: dict[str, object] = {}
    for count in (1, 32):
        pages, samples = PageAllocator(10_000), []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            began = time.perf_counter()
            for _ in range(1000):
                pages.release(pages.allocate(count, KvDevice(0)) or ())
            samples.append((time.perf_counter() - began) / (1000 * count) * 1e6)
        result[f"median_us_per_page_{count}_at_a_time"] = round(statistics.median(samples), 3)
    return result


def per_table_page(seconds: float) -> dict[str, object]:
    """Microseconds a page of a table's life: grow chunk by chunk (pages are evicted from the prefix cache)
    and release; grow by as many tokens as a decode grant has steps; chunk by chunk with every chunk's key
    made and published; make keys, find chunks, hold and let go.
    """
    layout, tokens, chunks = make_layout(SPEC, choose_page_bytes([SPEC])), list(range(1 << 16)), 1000
    model, device, size = ModelIndex(0), KvDevice(0), layout.tokens_per_page
    places = DevicePages.of([2 * chunks])
    pool = KvPool({model: layout}, places, step_tokens=1, prefix_secret=bytes(32))
    root = pool.root_key(model, b"")
    times: dict[str, list[float]] = {"grown": [], "granted": [], "published": [], "found": []}
    deadline, salt, granted = time.monotonic() + seconds, 0, SchedulerConfig().decode_steps // size
    while time.monotonic() < deadline:
        salt += 1
        for name, samples in times.items():
            table, key = pool.open(model, device), next_key(root, (salt,))
            began = time.perf_counter()
            for chunk in range(chunks):
                if name in ("published", "found"):
                    key = next_key(key, tokens[chunk * size : (chunk + 1) * size])
                if name == "found":
                    pool.share(table, (key,))
                elif name != "granted" or chunk % granted == granted - 1:
                    pool.grow(table, (chunk + 1) * size)
                if name == "published":
                    pool.publish(table, (key,))
            pages = table.pages
            pool.release(table)
            samples.append((time.perf_counter() - began) / pages * 1e6)
    return {f"median_us_per_page_{name}": round(statistics.median(t), 3) for name, t in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="time of each measurement")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    gc.disable()
    result = {
        "machine": describe(),
        "step": [
            per_micro_batch(models, sequences, steps, options.seconds)
            for models, sequences, steps in ((16, 64, 4), (16, 64, 1), (64, 64, 4), (1, 64, 4))
        ],
        "page": per_page(options.seconds),
        "table": {"tokens_per_page": make_layout(SPEC, choose_page_bytes([SPEC])).tokens_per_page}
        | per_table_page(options.seconds),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
