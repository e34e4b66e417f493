"""The limit that decode is measured against: how fast this machine's memory is read, now.

On a shared machine it depends on what the neighbours do and changes within seconds. So it is measured in
short windows before and after every measurement, and only ratios of neighbours in time are used.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numpy.typing import NDArray

BUFFER_BYTES = 2**30
"""Much more than any cache holds; read in well under 100 ms."""


@numba.njit(nogil=True)
def add_up(values: NDArray[np.int64]) -> int:
    """Read everything: eight sums, each over a stretch of its own, as one core reads fastest."""
    a = b = c = d = e = f = g = h = 0
    n = values.size // 8
    for i in range(n):
        a += values[i]
        b += values[n + i]
        c += values[2 * n + i]
        d += values[3 * n + i]
        e += values[4 * n + i]
        f += values[5 * n + i]
        g += values[6 * n + i]
        h += values[7 * n + i]
    return a + b + c + d + e + f + g + h


class ReadBandwidth:
    """Reads one large buffer on huge pages, with each number of threads in ``threads``."""

    def __init__(self, threads: Sequence[int] = (1, 2)) -> None:
        self.threads = tuple(threads)
        memory = mmap.mmap(-1, BUFFER_BYTES)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._values = np.frombuffer(memory, np.int64)
        self._values[:] = 1
        self._pool = ThreadPoolExecutor(max(self.threads))
        self.window()

    def window(self) -> dict[int, float]:
        """Bytes per second by number of threads, from reading the buffer once with each."""
        return {threads: self._read(threads) for threads in self.threads}

    def _read(self, threads: int) -> float:
        parts = np.array_split(self._values, threads)
        begin = time.perf_counter()
        list(self._pool.map(add_up, parts))
        return BUFFER_BYTES / (time.perf_counter() - begin)
