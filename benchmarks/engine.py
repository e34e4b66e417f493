"""The engine by itself, without HTTP: decode against the read bandwidth, prompts in operations per second.

    python benchmarks/engine.py FOLDER [--streams 1,4] [--prompt 512] [--kernels reference]

Decode of some streams alternates with reads of as much memory by as many threads; the median of the ratios of
neighbours is what counts. Prompts are timed from their arrival to their first token.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time

from machine import describe
from peers.bandwidth import ReadBandwidth
from peers.checkpoints import bytes_of_step

from crosspool.build.start import start_engine
from crosspool.core.config import EngineConfig, Kernels, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.engine.engine import Engine
from crosspool.models.registry import read_spec

_ids = itertools.count()


def request(engine: Engine, rng: random.Random, prompt: int, output: int) -> Request:
    tokens = tuple(rng.randrange(100, engine.info.models[0].vocab_size - 1) for _ in range(prompt))
    params = SamplingParams(temperature=0, max_tokens=output)
    number = RequestId(next(_ids))
    return Request(number, ModelIndex(0), tokens, params, output, 0, frozenset(), Nanoseconds(0))


def run(engine: Engine, requests: list[Request]) -> dict[int, list[float]]:
    """Serve all at once. Returns the times of each one's tokens, the first entry being when it was added."""
    times: dict[int, list[float]] = {}
    for item in requests:
        times[item.id] = [time.perf_counter()]
        engine.add(item)
    while engine.has_work():
        for output in engine.step():
            times[output.request] += [time.perf_counter()] * len(output.token_ids)
        engine.wait(1.0)
    return times


def decode_rate(times: dict[int, list[float]]) -> float:
    """Tokens per second of all, while all decode."""
    begin = max(own[1] for own in times.values())
    end = min(own[-1] for own in times.values())
    return sum(begin < at <= end for own in times.values() for at in own[1:]) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", type=Kernels, default=Kernels.COMPILED)
    parser.add_argument("--decode-steps", type=int, default=SchedulerConfig().decode_steps)
    o = parser.parse_args()
    print(describe(), vars(o))
    config = EngineConfig(
        (ModelConfig("it", o.folder),),
        PoolConfig(kv_pool_bytes=2**31),
        SchedulerConfig(decode_steps=o.decode_steps),
        threads=o.threads,
        kernels=o.kernels,
    )
    engine, spec = start_engine(config), read_spec(o.folder)
    rng, limit = random.Random(0), ReadBandwidth((o.threads,))
    try:
        for streams in map(int, o.streams.split(",")):
            rates, shares, gaps = [], [], []
            for _ in range(o.rounds):
                before = limit.window()[o.threads]
                batch = [request(engine, rng, o.context, o.output) for _ in range(streams)]
                times = run(engine, batch)
                after = limit.window()[o.threads]
                rates.append(decode_rate(times))
                read = rates[-1] / streams * bytes_of_step(spec, o.context + o.output / 2)
                shares.append(read / ((before + after) / 2))
                gaps += [b - a for own in times.values() for a, b in itertools.pairwise(own[1:])]
            gaps.sort()
            print(
                f"{streams} streams: {statistics.median(rates):.1f} tokens/s, a stream's bytes at "
                f"{statistics.median(shares):.2f} of {after / 1e9:.1f} GB/s; gaps p50 "
                f"{1e3 * gaps[len(gaps) // 2]:.2f}, p99 {1e3 * gaps[len(gaps) * 99 // 100]:.2f}, "
                f"max {1e3 * gaps[-1]:.2f} ms"
            )
        firsts = []
        for _ in range(o.rounds if o.prompt else 0):
            (own,) = run(engine, [request(engine, rng, o.prompt, 1)]).values()
            firsts.append(own[1] - own[0])
        if firsts:
            print(f"first token after {o.prompt}: {1e3 * statistics.median(firsts):.1f} ms")
    finally:
        engine.close()


if __name__ == "__main__":
    main()
