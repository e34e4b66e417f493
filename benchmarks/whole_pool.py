"""What it costs a decode that its context lies on two KV devices: tokens per second, local against spread.

    PYTHONPATH=benchmarks python benchmarks/whole_pool.py [--contexts 2000,8000] [--rounds 6] [--kv-heads 4]

A random model of 8 layers with pools on cpu:0 and cpu:1, one thread each. Grants are made by hand, so that
the same sequence has its pages at home, all of them elsewhere, its second half elsewhere (as when its home
was full), or every other block of attention. Keys and values are random. Placements take turns in every
round; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from machine import describe
from transformers import Qwen3MoeConfig

import helpers_workers
from helpers_models import random_model, save_model
from helpers_workers import Rig, TinyModel

STEPS = 16
PLACES: dict[str, Callable[[int], Callable[[int], int] | None]] = {
    "at home": lambda chunks: None,
    "all elsewhere": lambda chunks: lambda chunk: 1,
    "second half": lambda chunks: lambda chunk: int(chunk >= chunks // 2),
    "block by block": lambda chunks: lambda chunk: chunk // 4 % 2,
}


def make_model(kv_heads: int) -> TinyModel:
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=kv_heads,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=65536,
    )
    with tempfile.TemporaryDirectory() as folder:
        return TinyModel.load(save_model(random_model(config), Path(folder)), "bfloat16")


def measure(it: Rig, places: str, context: int) -> float:
    """Tokens per second of one sequence's decode, after a few."""
    chunks = it.models[0].layout.chunks(context + STEPS + 1)
    sequence = it.sequence([7] * context, STEPS + 1, lent=PLACES[places](chunks))
    sequence.output, sequence.computed = [1], context
    it.finish(it.decode(2, sequence))
    begin = time.perf_counter()
    it.finish(it.decode(STEPS - 2, sequence))
    speed = (STEPS - 2) / (time.perf_counter() - begin)
    for group in sequence.pages:
        for page in group:
            it.free[it.places.device_of(page)].append(page)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="200,1000,4000,16000")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    options = parser.parse_args()
    contexts = [int(context) for context in options.contexts.split(",")]
    helpers_workers.PAGE_BYTES = 64 * 8 * 2 * options.kv_heads * 64 * 2
    helpers_workers.NUM_PAGES = max(contexts) // 64 + 8
    model = make_model(options.kv_heads)
    print(describe())
    devices = ["cpu:0", "cpu:1"]
    it = Rig([model], devices, devices, resident=True)
    for page in it.arena:
        page.view(torch.bfloat16).normal_()
    try:
        for context in contexts:
            compare(it, context, options.rounds)
    finally:
        it.executor.close()


def compare(it: Rig, context: int, rounds: int) -> None:
    """Print the speed of every placement, and how much of that at home it is."""
    speeds: dict[str, list[float]] = {places: [] for places in PLACES}
    for number in range(rounds + 1):
        for places in list(PLACES)[:: 1 if number % 2 else -1]:
            speed = measure(it, places, context)
            if number:
                speeds[places].append(speed)
    for places, own in speeds.items():
        pairs = zip(own, speeds["at home"], strict=True)
        ratio = statistics.median(spread / local for spread, local in pairs)
        print(f"{context:6} {places:14} {statistics.median(own):7.1f} tokens/s  {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    main()
