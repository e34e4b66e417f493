"""How many graphs 8 models of 3 geometries need, and their memory. Kernels are as many as real models have;
their matrices are small, for only the number of launches counts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.engine.engine import Engine
from gpu.device import Gpu
from gpu.models import free_memory, start_engine, write_config
from gpu.results import Figure, at_most

MOST_BYTES = 2 << 30
COMMON: dict[str, Any] = {"hidden_size": 256, "vocab_size": 2048, "max_position_embeddings": 4096}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"moe_intermediate_size": 64, "num_experts": 16, "num_attention_heads": 8},
    "deepseek-v2-lite": {"moe_intermediate_size": 64, "n_routed_experts": 16, "intermediate_size": 256},
    "mixtral-8x7b-v0.1": {"intermediate_size": 64, "num_attention_heads": 8, "head_dim": 32},
}
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 64}
MODELS = 8


def config(gpu: Gpu, folder: Path) -> EngineConfig:
    models = []
    for number in range(MODELS):
        name = list(GEOMETRIES)[number % len(GEOMETRIES)]
        changes = COMMON | GEOMETRIES[name] | (TINY if gpu.interpreted else {})
        models.append(ModelConfig(f"m{number}", str(write_config(folder / f"m{number}", name, **changes))))
    limits = {"chunk_quantum": 16, "max_chunk_tokens": 16, "max_running": 8}
    rows = {"max_batch_rows": 2, "max_prefill_rows": 2} if gpu.interpreted else {}
    return EngineConfig(
        tuple(models),
        PoolConfig(kv_pool_bytes=(1 << 24) if gpu.interpreted else (1 << 28), prefix_cache=False),
        SchedulerConfig(**limits, **rows),
        kv_devices=("cuda:0",),
        weights_devices=("cuda:0",),
    )


def graphs_of(engine: Engine) -> int:
    homes: Any = engine._executor._feeder._homes  # type: ignore[attr-defined]
    lanes = [lane for home in homes for lane in home.lanes]
    passes = [lane_pass for lane in lanes for own in lane._passes.values() for _, lane_pass in own]
    return sum(len(lane_pass._graphs) for lane_pass in passes)


def variants(gpu: Gpu) -> list[Figure]:
    """What the engine takes from the card beside its tensors: graphs, and the code of kernels."""
    free_memory(gpu)
    reserved = (lambda: 0) if gpu.interpreted else torch.cuda.memory_reserved
    before, tensors = gpu.device.free_bytes, reserved()
    begin = time.perf_counter()
    engine = start_engine(gpu, config(gpu, gpu.folder / "variants"))
    took = time.perf_counter() - begin
    try:
        taken = before - gpu.device.free_bytes - (reserved() - tensors)
        return [
            Figure("graphs", graphs_of(engine)),
            at_most("memory of graphs and code", taken / 2**30, "GiB", MOST_BYTES / 2**30),
            Figure("to start, compiling what is new", took, "s"),
        ]
    finally:
        engine.close()
