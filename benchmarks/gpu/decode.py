"""Section 6: Qwen3-30B-A3B with random weights through the engine, its lanes and its graphs, in 16 bits and
with its FFNs in float8."""

from __future__ import annotations

import random
import statistics
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.ids import Nanoseconds
from crosspool.core.spec import ModelSpec
from crosspool.engine.engine import Engine
from gpu.device import Gpu
from gpu.models import free_memory, replaying, spec_of, start_engine, write_config
from gpu.results import Case, Figure, NotMeasured, at_most
from gpu.serving import gaps_while_all_decode, host_time, random_request, serve

BATCHES = (1, 8, 32)
MOST_STEP = 2.0
"""Milliseconds between tokens of a lone request."""
MOST_HOST = 5.0
"""Microseconds of the engine's thread for a token."""
STARTS = 150.0
"""Seconds that a case may take which starts the engine: all its code may have to be compiled, some 60 kernels
of half a second each."""
PREFILL_SHARE = 0.5
"""Of the operations per second of a large product."""

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


class Model:
    """An engine of one model, which is started when it is first needed and goes when it is closed; if it does
    not start, nobody tries again. Without ``loops`` the host launches each pass."""

    def __init__(self, gpu: Gpu, weights_dtype: str = "auto", *, loops: bool = True) -> None:
        self._gpu, self._loops = gpu, loops
        self._engine: Engine | None = None
        self._failed = False
        self.rng = random.Random(0)
        tiny = gpu.interpreted
        self.context, self.output, self.prompt = (6, 3, 10) if tiny else (1024, 512, 8192)
        self.batches = (2,) if tiny else BATCHES
        path = write_config(gpu.folder / "it", "qwen3-30b-a3b", **(SMALL if tiny else {}))
        self.spec: ModelSpec = spec_of(path, weights_dtype)
        chunk = 32 if tiny else 8192
        self._config = EngineConfig(
            (ModelConfig("it", str(path), weights_dtype=weights_dtype),),
            PoolConfig(kv_pool_bytes=1 << (18 if tiny else 33), prefix_cache=False, spill_bytes=0),
            SchedulerConfig(
                chunk_quantum=16,
                max_chunk_tokens=chunk,
                chunk_layer_cost=Nanoseconds(10**9),
                max_batch_rows=self.batches[-1],
                max_running=2 * self.batches[-1],
            ),
            kv_devices=("cuda:0",),
            weights_devices=("cuda:0",),
        )

    @property
    def engine(self) -> Engine:
        """It says at its end whether anything was allocated on the device meanwhile, so the limits that need
        memory are measured before. Raises NotMeasured if it has not started when that was first tried."""
        if self._engine is None:
            if self._failed:
                raise NotMeasured("the engine did not start")
            _ = self._gpu.copy_bandwidth, self._gpu.matmul_peak
            free_memory(self._gpu)
            self._failed = True
            with nullcontext() if self._loops else replaying(self._gpu):
                self._engine = start_engine(self._gpu, self._config)
            self._failed = False
        return self._engine

    def requests(self, count: int, prompt: int, output: int) -> list[Any]:
        return [random_request(self.engine, self.rng, prompt, output) for _ in range(count)]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        free_memory(self._gpu)


def bytes_of_step(spec: ModelSpec, rows: int, context: float) -> float:
    """What one pass must read: all but the embedding, experts if some row chooses them (each with the chance
    that it has where choices are even), and the rows' KV."""
    head = spec.vocab_size * spec.hidden_size * spec.dtype.bytes
    layers: float = spec.num_layers * spec.attention_bytes
    for layer in spec.layers:
        ffn, router = layer.ffn, layer.ffn.router
        assert router is not None
        read = router.num_experts * (1 - (1 - router.top_k / router.num_experts) ** rows)
        layers += ffn.router_weights(spec.hidden_size) * spec.dtype.bytes
        layers += spec.bytes_of_ffn(replace(ffn, router=None)) * read
    return head + layers + rows * context * spec.kv_bytes_per_token


def tbt(gpu: Gpu, model: Model, rows: int, most: float | None = None) -> list[Figure]:
    """``most`` is the target, in milliseconds."""
    if not gpu.interpreted:
        serve(model.engine, model.requests(rows, model.context, 3))
    times = serve(model.engine, model.requests(rows, model.context, model.output))
    gaps = sorted(gaps_while_all_decode(times))
    if not gaps:
        raise NotMeasured("requests did not decode at the same time")
    middle = statistics.median(gaps)
    longest = max(own[1] for own in times.values())
    whole = statistics.median((own[-1] - longest) / sum(at > longest for at in own) for own in times.values())
    read = bytes_of_step(model.spec, rows, model.context + model.output / 2)
    return [
        Figure("between tokens, mean", 1e3 * whole, "ms", most, at_least=False),
        Figure("between tokens, median", 1e3 * middle, "ms"),
        Figure("between tokens, P99", 1e3 * gaps[len(gaps) * 99 // 100], "ms"),
        Figure("tokens a second", rows / whole, "/s"),
        Figure("share of a copy's bandwidth", read / whole / gpu.copy_bandwidth),
    ]


def host(gpu: Gpu, model: Model) -> list[Figure]:
    """Of requests whose tokens leave through the pipe, as they do in a server."""
    used = host_time(model.engine, model.requests(min(8, model.batches[-1]), model.context, 4 * model.output))
    if used.tokens <= 0:
        raise NotMeasured("no request decoded")
    return [
        at_most("the engine's thread, a token", 1e6 * used.engine / used.tokens, "us", MOST_HOST),
        Figure("all threads, a token", 1e6 * used.process / used.tokens, "us"),
        Figure("tokens", used.tokens),
    ]


def prefill(gpu: Gpu, model: Model) -> list[Figure]:
    spec, prompt = model.spec, model.prompt
    if not gpu.interpreted:
        serve(model.engine, model.requests(1, prompt, 1))
    spans = []
    for _ in range(1 if gpu.interpreted else 5):
        (times,) = serve(model.engine, model.requests(1, prompt, 1)).values()
        spans.append(times[1] - times[0])
    took = statistics.median(spans)
    active = sum(layer.ffn.active_weights(spec.hidden_size) for layer in spec.layers)
    projections = spec.num_layers * sum(
        rows * columns for rows, columns in spec.attention.matrices(spec.hidden_size)
    )
    wide = spec.attention.num_heads * spec.attention.head_dim  # type: ignore[union-attr]
    attention = spec.num_layers * 2 * wide * prompt**2
    operations = 2 * prompt * (active + projections) + attention
    return [
        Figure("first token", 1e3 * took, "ms"),
        Figure("prompt tokens a second", prompt / took, "/s"),
        Figure("operations", operations / took / 1e12, "TFLOP/s"),
        Figure("share of the matmul peak", operations / took / gpu.matmul_peak, "", PREFILL_SHARE),
    ]


def close(gpu: Gpu, model: Model) -> list[Figure]:
    """The engine says whether it has allocated anything while it served."""
    model.close()
    return [Figure("free memory", gpu.device.free_bytes / 1e9, "GB")]


def replayed(gpu: Gpu, rows: int) -> list[Case]:
    """Without loops. They come first: should loops fail, or never end, these have been measured."""
    model = Model(gpu, loops=False)
    return [
        Case(f"{rows} rows, a replay a pass", partial(tbt, gpu, model, rows), STARTS),
        Case("host time, a replay a pass", partial(host, gpu, model), 90),
        Case("end of replays", partial(close, gpu, model)),
    ]


def cases(gpu: Gpu) -> list[Case]:
    from gpu.variants import variants

    model, float8 = Model(gpu), Model(gpu, "float8")
    made = replayed(gpu, model.batches[0]) if gpu.device.loops else []
    for rows in model.batches:
        most = MOST_STEP if rows == 1 else None
        made.append(Case(f"{rows} rows", partial(tbt, gpu, model, rows, most), STARTS))
    made.append(Case("host time", partial(host, gpu, model), 90))
    made.append(Case(f"a prompt of {model.prompt} tokens", partial(prefill, gpu, model), 90))
    made.append(Case("end", partial(close, gpu, model)))
    made += [Case(f"{rows} rows, float8", partial(tbt, gpu, float8, rows), STARTS) for rows in float8.batches]
    made.append(Case("end, float8", partial(close, gpu, float8)))
    made.append(Case("graphs of 8 models of 3 geometries", partial(variants, gpu), 150))
    return made
