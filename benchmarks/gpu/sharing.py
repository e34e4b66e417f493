"""Section 7: models that share a card as two devices, under a burst of long requests to one of them, in three
modes of equal bytes; and what lowering and the lanes beside each other are worth.

The models are a few layers of Qwen3-30B-A3B with a quarter of its experts, in float8 where the card has no
room for them in 16 bits. A device has room for all their experts; the burst's prompts are scaled to most of
what the two pools leave for KV. There is no spill store, as in pools/modes_virtual.py: memory would be pinned
for it at each start.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from pools.replay import Window, replay, summary

import crosspool.build.cuda as build_cuda
from crosspool.core.config import EngineConfig, Mode, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.ids import ModelIndex, Nanoseconds
from crosspool.workers.cuda.home import HomePlan, LanesOf
from crosspool.workers.cuda.lane_pass import LanePass
from gpu.decode import SMALL
from gpu.device import Gpu
from gpu.models import free_memory, random_weights, spec_of, start_engine, write_config
from gpu.results import Case, Figure, NotMeasured
from gpu.serving import gaps_while_all_decode, random_request, serve

WINDOW = Path(__file__).parents[1] / "data" / "longburst_window.json"
DEVICES = ("cuda:0/0", "cuda:0/1")
GEOMETRY: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_experts": 32,
    "vocab_size": 8192,
    "max_position_embeddings": 65536,
}
RATE, MOST_SECONDS = 32.0, 25.0
USABLE = 0.95
"""Of the card's free memory."""
BURST_SHARE = 0.8
"""Of the KV that two pools leave, for the burst's prompts."""


def window_for(models: int, interpreted: bool) -> Window:
    """The burst goes to model 0, the others' requests to all in turn as the trace has them."""
    columns = {name: np.array(values) for name, values in json.loads(WINDOW.read_text()).items()}
    if interpreted:
        some = np.concatenate([np.flatnonzero(columns["burst"] == kind)[:1] for kind in (0, 1)])
        columns = {name: values[np.sort(some)] for name, values in columns.items()}
        columns["output_tokens"] = np.full(len(some), 3)
    models_of = np.where(columns["burst"] == 1, 0, columns["model_index"] % models)
    return {**columns, "model_index": models_of}


@dataclass
class Zoo:
    """So many models, and what each device has."""

    gpu: Gpu
    folder: Path
    models: int
    weights_dtype: str = "auto"

    def __post_init__(self) -> None:
        changes = SMALL if self.gpu.interpreted else GEOMETRY
        self.paths = [
            write_config(self.folder / f"m{number}", "qwen3-30b-a3b", **changes)
            for number in range(self.models)
        ]
        self.specs = {
            ModelIndex(number): spec_of(path, self.weights_dtype) for number, path in enumerate(self.paths)
        }
        self.window = window_for(self.models, self.gpu.interpreted)

    def config(self, mode: Mode, device_bytes: int | None = None, **scheduler: Any) -> EngineConfig:
        kv, weights = (DEVICES[:1], DEVICES[1:]) if mode is Mode.CROSSPOOL else (DEVICES, DEVICES)
        tiny = {"max_batch_rows": 2, "max_prefill_rows": 2, "max_chunk_tokens": 32, "max_running": 8}
        limits = {"max_chunk_tokens": 2048, "max_running": 64, "chunk_layer_cost": Nanoseconds(2_000_000)}
        limits |= {"tbt_target": Nanoseconds(10_000_000), "chunk_quantum": 16}
        limits |= (tiny if self.gpu.interpreted else {}) | scheduler
        return EngineConfig(
            tuple(ModelConfig(path.name, str(path), weights_dtype=self.weights_dtype) for path in self.paths),
            PoolConfig(device_bytes=device_bytes, prefix_cache=False, spill_bytes=0),
            SchedulerConfig(**limits),
            kv_devices=kv,
            weights_devices=weights,
            mode=mode,
        )

    @cached_property
    def device_bytes(self) -> int:
        """Room for all experts, and for what any mode needs beside weights and KV."""
        besides = 0
        with random_weights(self.gpu):
            devices = build_cuda.make_cuda_devices(DEVICES)
            for mode in Mode:
                besides = max(besides, *build_cuda.bytes_besides(self.config(mode), self.specs, devices))
        experts = sum(spec.total_ffn_bytes for spec in self.specs.values())
        attention = sum(spec.attention_side_bytes for spec in self.specs.values())
        return besides + int(1.05 * experts) + attention // 2 + (1 << 20)

    @property
    def fits(self) -> bool:
        return self.device_bytes * len(DEVICES) <= self.gpu.device.free_bytes * USABLE

    @cached_property
    def fitting(self) -> Zoo:
        """This one, or its models in float8 if it did not fit when that was first asked."""
        free_memory(self.gpu)
        return self if self.fits else replace(self, weights_dtype="float8")

    @cached_property
    def shrink(self) -> tuple[int, int]:
        """How much shorter prompts and outputs are than in the trace."""
        config = self.config(Mode.CROSSPOOL, self.device_bytes)
        with random_weights(self.gpu):
            plan = build_cuda.CudaMachine(config).plan(self.specs)
        layout = plan.layouts[ModelIndex(0)]
        tokens = plan.places.total // len(layout.groups) * layout.tokens_per_page
        tokens = min(tokens, 40 if self.gpu.interpreted else tokens)
        burst = self.window["prompt_tokens"][self.window["burst"] == 1].sum()
        return max(1, int(burst / (BURST_SHARE * tokens))), 1 if self.gpu.interpreted else 8


def mode_figures(zoo: Zoo, mode: Mode) -> list[Figure]:
    free_memory(zoo.gpu)
    zoo = zoo.fitting
    if not zoo.fits:
        raise NotMeasured(f"two devices of {zoo.device_bytes:,} bytes do not fit")
    engine = start_engine(zoo.gpu, zoo.config(mode, zoo.device_bytes))
    try:
        numbers = itertools.count(1)
        few = {name: values[:20] for name, values in zoo.window.items()}
        if not zoo.gpu.interpreted:
            replay(engine, few, 1000.0, numbers, zoo.shrink, MOST_SECONDS)
        rate = 1e4 if zoo.gpu.interpreted else RATE
        outcome = replay(engine, zoo.window, rate, numbers, zoo.shrink, MOST_SECONDS)
        unfinished = sum(len(s.tokens) < s.wanted and not s.refused for s in outcome.served)
        pool = engine.info.kv_pool_bytes
    finally:
        engine.close()
    if not outcome.gaps or not outcome.waits:
        raise NotMeasured("no tokens followed each other while the burst went on")
    found = summary([outcome])
    return [
        Figure("between tokens, P99", found["p99"], "ms"),
        Figure("between tokens, P50", found["p50"], "ms"),
        Figure("between tokens, longest", found["max"], "ms"),
        Figure("first token, P99", 1e3 * found["ttft_p99"], "ms"),
        Figure("KV pool", pool / 1e6, "MB"),
        Figure("requests", found["requests"]),
        Figure("refused", found["refused"]),
        Figure("given up", unfinished),
        Figure("preempted", found["preemptions"]),
        bits(zoo),
    ]


def bits(zoo: Zoo) -> Figure:
    """What the models' FFNs are held in."""
    spec = zoo.specs[ModelIndex(0)]
    return Figure("bits of an FFN weight", 8 if spec.weights_dtype == "float8" else 8 * spec.dtype.bytes)


def plain(stack: ExitStack) -> dict[str, Any]:
    return {}


def a_step_a_grant(stack: ExitStack) -> dict[str, Any]:
    """The engine's thread decides after every token."""
    return {"decode_steps": 1, "turn_steps": 1}


def without_graphs(stack: ExitStack) -> dict[str, Any]:
    """The host launches every kernel."""
    stack.enter_context(patch.object(LanePass, "record", lambda self: None))
    return {}


def one_lane(stack: ExitStack) -> dict[str, Any]:
    """Passes of one model wait for those of the other."""
    stack.enter_context(patch.object(build_cuda, "HomePlan", partial(HomePlan, lanes=LanesOf(1, 1))))
    return {}


VARIANTS: dict[str, Callable[[ExitStack], dict[str, Any]]] = {
    "whole": plain,
    "a step a grant": a_step_a_grant,
    "without graphs": without_graphs,
    "one lane": one_lane,
}


def ablation(zoo: Zoo, variant: Callable[[ExitStack], dict[str, Any]]) -> list[Figure]:
    """Two streams of each model at once."""
    free_memory(zoo.gpu)
    zoo = zoo.fitting
    rng, tiny = random.Random(0), zoo.gpu.interpreted
    prompt, output = (4, 3) if tiny else (256, 128)
    with ExitStack() as stack:
        limits = variant(stack)
        engine = start_engine(zoo.gpu, zoo.config(Mode.CROSSPOOL, zoo.device_bytes, **limits))
    try:
        figures = []
        for _ in range(1 if tiny else 2):
            models = [model for model in range(zoo.models) for _ in range(2)]
            wanted = [random_request(engine, rng, prompt, output, model) for model in models]
            gaps = gaps_while_all_decode(serve(engine, wanted))
            if gaps:
                figures = [
                    Figure("between tokens, mean", 1e3 * statistics.fmean(gaps), "ms"),
                    Figure("between tokens, P99", 1e3 * sorted(gaps)[len(gaps) * 99 // 100], "ms"),
                    bits(zoo),
                ]
    finally:
        engine.close()
    if not figures:
        raise NotMeasured("requests did not decode at the same time")
    return figures


def cases(gpu: Gpu) -> list[Case]:
    made = []
    for count in (2,) if gpu.interpreted else (2, 3):
        zoo = Zoo(gpu, gpu.folder / f"{count}", count)
        modes = (Mode.CROSSPOOL, Mode.MONOLITHIC, Mode.STATIC)
        for mode in modes[::2] if gpu.interpreted else modes:
            run = partial(mode_figures, zoo, mode)
            made.append(Case(f"{count} models, {mode}", run, 180))
        if count == 2:
            some = ("without graphs",) if gpu.interpreted else VARIANTS
            made += [Case(f"ablation: {name}", partial(ablation, zoo, VARIANTS[name]), 90) for name in some]
    return sorted(made, key=lambda case: case.name.startswith("ablation"))
