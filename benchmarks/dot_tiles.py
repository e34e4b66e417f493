"""How fast the compiled dot tiles read and multiply: decode against read bandwidth, prefill against oneDNN.

Each figure alternates with its limit in the same run, in short windows; medians and medians of paired ratios
are printed. Run: python benchmarks/dot_tiles.py
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numba
import numpy as np
import torch
from machine import describe

from crosspool.kernels.numba.linear import multiply_rows
from crosspool.kernels.numba.matrix import CODES, Weight, describe_matrix, quantise

LIMIT_BYTES = 192 * 2**20
READS = 4
TIMES = 40


@numba.njit(nogil=True)
def add_up(values: np.ndarray, times: int) -> int:
    """Read everything, with sums that do not wait for each other."""
    total = 0
    for _ in range(times):
        for i in range(values.size):
            total += values[i]
    return total


@numba.njit(nogil=True)
def multiply(matrix, first, last, x, dtype, count, out, stride, times) -> None:
    """The same product over and over."""
    for _ in range(times):
        multiply_rows(matrix, first, last, x, dtype, count, out, stride)


def seconds(function: Callable[..., object], shares: Sequence[tuple[object, ...]]) -> float:
    """Wall time of one thread for each share. It includes some 0.1 ms to start them."""
    threads = [threading.Thread(target=function, args=share) for share in shares]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def product(weight: Weight, vectors: torch.Tensor, threads: int, times: int) -> Callable[[], float]:
    """A function that multiplies all rows by all vectors ``times`` times, with rows halved among threads,
    and says how long one time took."""
    matrix, dtype = describe_matrix(weight), CODES[vectors.dtype]
    out = torch.empty(len(vectors), matrix.rows)
    step = vectors.stride(0) * vectors.element_size()
    addresses = vectors.data_ptr() + step * np.arange(len(vectors), dtype=np.int64)
    cuts = [matrix.rows * i // threads for i in range(threads + 1)]
    shares = [
        (
            matrix,
            first,
            last,
            addresses,
            dtype,
            len(vectors),
            out.data_ptr() + 4 * first,
            4 * matrix.rows,
            times,
        )
        for first, last in pairwise(cuts)
    ]
    alive = (weight, vectors, out)

    def run() -> float:
        assert alive
        return seconds(multiply, shares) / times

    return run


def decode(weight: Weight, count: int, threads: int, windows: int, hidden: int) -> tuple[float, float]:
    """Median bytes of weights per second, and median share of the read bandwidth beside it."""
    run = product(weight, torch.randn(count, hidden).bfloat16(), threads, READS)
    values = weight if isinstance(weight, torch.Tensor) else weight.values
    memory = np.ones(LIMIT_BYTES // 8, np.int64)
    shares = [(part, READS) for part in np.array_split(memory, threads)]
    run(), seconds(add_up, shares)
    rates, ratios = [], []
    for _ in range(windows):
        limit = READS * LIMIT_BYTES / seconds(add_up, shares)
        rates.append(values.nbytes / run())
        ratios.append(rates[-1] / limit)
    return statistics.median(rates), statistics.median(ratios)


def prefill(rows: int, hidden: int, count: int, threads: int, windows: int) -> tuple[float, float]:
    """Median operations per second of the tiles and of torch, in turns."""
    weight, vectors = torch.randn(rows, hidden).bfloat16(), torch.randn(count, hidden).bfloat16()
    run = product(weight, vectors, threads, TIMES)
    torch.set_num_threads(threads)
    run(), torch.nn.functional.linear(vectors, weight)
    ours, theirs = [], []
    for _ in range(windows):
        ours.append(2 * rows * hidden * count / run())
        begin = time.perf_counter()
        for _ in range(TIMES):
            torch.nn.functional.linear(vectors, weight)
        theirs.append(TIMES * 2 * rows * hidden * count / (time.perf_counter() - begin))
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=21)
    options = parser.parse_args()
    print(describe())
    for name, quantised in (("bfloat16", False), ("int8", True)):
        for hidden in (576, 1024):
            weight: Weight = torch.randn(LIMIT_BYTES // (2 * hidden), hidden).bfloat16()
            if quantised:
                assert isinstance(weight, torch.Tensor)
                weight = quantise(weight)
            for count in (1, 2, 4, 8, 16):
                rate, share = decode(weight, count, options.threads, options.windows, hidden)
                print(
                    f"{name} weights [., {hidden}], {count} vectors: {rate / 1e9:.1f} GB/s, "
                    f"{share:.2f} of read bandwidth"
                )
    for rows, hidden, count in ((1024, 1024, 512), (512, 1024, 43), (1024, 512, 43), (1536, 576, 512)):
        ours, theirs = prefill(rows, hidden, count, options.threads, options.windows)
        print(
            f"[{rows}, {hidden}] by {count} vectors: {ours / 1e9:.0f} GFLOP/s, torch {theirs / 1e9:.0f}, "
            f"ratio {ours / theirs:.2f}"
        )


if __name__ == "__main__":
    main()
