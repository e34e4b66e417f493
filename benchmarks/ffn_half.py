"""How fast a team computes the FFN halves of a Mixture-of-Experts model: decode against bandwidth, prefill
in operations per second.

Decode goes round a ring of layers that is far larger than the caches, so that weights come from memory; it
alternates with a read of as much memory by the same threads. Run: python benchmarks/ffn_half.py
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable

import numba
import numpy as np
import torch
from machine import describe

from crosspool.kernels.numba.ffn import ffn_half
from crosspool.kernels.numba.ffn_fields import Expert, describe_ffn, ffn_mine_bytes, ffn_room_bytes
from crosspool.kernels.numba.matrix import Weight, quantise
from crosspool.kernels.numba.router import describe_router
from crosspool.kernels.numba.team import SHARED_WORDS, new_own

BFLOAT16 = 1


@numba.njit(nogil=True)
def run_layers(shared, own, layers, normed, count, room, mine, out, rounds) -> None:
    """Every layer's FFN half ``rounds`` times, from the same input."""
    for _ in range(rounds):
        for layer in range(len(layers)):
            ffn_half(shared, own, layers[layer], normed, count, BFLOAT16, room, mine, out)


@numba.njit(nogil=True)
def add_up(values, times) -> int:
    """Read everything, with sums that do not wait for each other."""
    total = 0
    for _ in range(times):
        for i in range(values.size):
            total += values[i]
    return total


def seconds(function: Callable[..., object], shares: list[tuple[object, ...]]) -> float:
    threads = [threading.Thread(target=function, args=share) for share in shares]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


class Model:
    """Layers of random experts, and the scratch of one team."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.keep: list[object] = []
        layers = [self._layer() for _ in range(options.layers)]
        self.layers = np.stack(layers)

    def _layer(self) -> np.ndarray:
        o = self.options
        experts = [Expert(*self._matrices(o.hidden, o.width)) for _ in range(o.experts)]
        weight = torch.randn(o.experts, o.hidden).bfloat16()
        self.keep += [experts, weight]
        rules = {"scoring": "softmax", "normalise": True, "scale": 1.0}
        rules |= {"groups": 1, "top_groups": 1, "group_score": "max"}
        return describe_ffn("silu", experts, describe_router(weight, None, top_k=o.top_k, **rules), None)

    def _matrices(self, hidden: int, width: int) -> tuple[Weight, ...]:
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        weights = [(torch.randn(*shape) / shape[1] ** 0.5).bfloat16() for shape in shapes]
        return tuple(quantise(weight) for weight in weights) if self.options.int8 else tuple(weights)

    def time(self, count: int, rounds: int) -> float:
        """Seconds of one round through all layers."""
        o = self.options
        normed = torch.randn(count, o.hidden).bfloat16()
        out = torch.empty_like(normed)
        shared = np.zeros(SHARED_WORDS, np.int64)
        room = np.zeros(ffn_room_bytes(self.layers[0], count), np.uint8)
        mine = [np.zeros(ffn_mine_bytes(self.layers[0], count), np.uint8) for _ in range(o.threads)]
        fixed = (self.layers, normed.data_ptr(), count, room.ctypes.data)
        shares: list[tuple[object, ...]] = [
            (shared.ctypes.data, new_own(i, o.threads), *fixed, own.ctypes.data, out.data_ptr(), rounds)
            for i, own in enumerate(mine)
        ]
        return seconds(run_layers, shares) / rounds

    def bytes_read(self) -> int:
        """Of one token's experts and routers in all layers."""
        o = self.options
        weights = 3 * o.top_k * o.hidden * o.width * (1 if o.int8 else 2)
        return int(o.layers * (weights + 2 * o.experts * o.hidden))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 1024), ("width", 512), ("experts", 48), ("top-k", 4), ("layers", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=21)
    parser.add_argument("--int8", action="store_true")
    o = parser.parse_args()
    print(describe(), vars(o))
    model = Model(o)
    model.time(1, 1)
    memory = np.ones(2**30 // 8, np.int64)
    shares: list[tuple[object, ...]] = [(part, 1) for part in np.array_split(memory, o.threads)]
    add_up(memory[:8], 1)
    rates, ratios = [], []
    for _ in range(o.windows):
        limit = memory.nbytes / seconds(add_up, shares)
        rates.append(model.bytes_read() / model.time(1, 10))
        ratios.append(rates[-1] / limit)
    print(
        f"decode: {statistics.median(rates) / 1e9:.1f} GB/s, {statistics.median(ratios):.2f} of the bandwidth"
    )
    for count in (43, 512):
        operations = 6 * count * o.top_k * o.hidden * o.width * o.layers
        took = statistics.median(model.time(count, 3) for _ in range(5))
        print(f"{count} tokens: {operations / took / 1e9:.0f} GFLOP/s, {took * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
