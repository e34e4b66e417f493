"""What lowering and the layer pipeline are worth, each by itself and both together.

    python benchmarks/ablation.py FOLDER [--rounds 10]

Without lowering, a team returns to Python after every layer task. Without the pipeline, the streams of a lone
model are one micro-batch, so that of two devices one always waits. Engines take turns in one process; those
that are not at work sleep. Figures are medians of the ratios of one round.
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial
from typing import Any

from machine import describe

from crosspool.build import cpu
from crosspool.build.start import start_engine
from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig
from crosspool.engine.engine import Engine
from crosspool.scheduler.micro_batches import Lanes
from crosspool.workers.resident.executor import ResidentExecutor
from engine import decode_rate, request, run

ONE_DEVICE: dict[str, Any] = {"threads": 2}
TWO_DEVICES: dict[str, Any] = {"weights_devices": ("cpu:1",), "threads": 1}


def start(folder: str, *, lowered: bool, pipelined: bool, devices: dict[str, Any]) -> Engine:
    """An engine with or without each of the two."""
    whole = cpu.ResidentExecutor
    cpu.ResidentExecutor = partial(ResidentExecutor, tasks=None if lowered else 1)  # type: ignore
    try:
        models = (ModelConfig("it", folder),)
        engine = start_engine(EngineConfig(models, PoolConfig(kv_pool_bytes=2**29), **devices))
    finally:
        cpu.ResidentExecutor = whole  # type: ignore[misc]
    if not pipelined:
        engine._scheduler._micro_batches._lanes = Lanes(alone=1, in_company=1)
    return engine


def compare(engines: dict[str, Engine], streams: int, rounds: int, output: int) -> None:
    """Print tokens per second of each, and how much faster each is than the last."""
    rng = random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            times = run(engines[name], [request(engines[name], rng, 64, output) for _ in range(streams)])
            if number:
                rates[name].append(decode_rate(times))
    base = rates[list(engines)[-1]]
    for name, own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        print(f"  {name}: {statistics.median(own):.1f} tokens/s, {ratio:.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=int, default=64)
    o = parser.parse_args()
    print(describe(), vars(o))
    for what, streams, devices in (
        ("one device, 1 stream", 1, ONE_DEVICE),
        ("two devices, 2 streams", 2, TWO_DEVICES),
    ):
        print(what)
        both = {"lowered and pipelined": (True, True), "lowered": (True, False), "neither": (False, False)}
        if devices is ONE_DEVICE:
            both = {"lowered": (True, True), "not lowered": (False, True)}
        engines = {
            name: start(o.folder, lowered=lowered, pipelined=pipelined, devices=devices)
            for name, (lowered, pipelined) in both.items()
        }
        try:
            compare(engines, streams, o.rounds, o.output)
        finally:
            for engine in engines.values():
                engine.close()


if __name__ == "__main__":
    main()
