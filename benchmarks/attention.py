"""How fast a team computes attention of one new token over long contexts, against its roofline.

The team goes round the layers of sequences whose pages lie scattered in an arena that is far larger than the
caches. Each window is compared with a read of as much memory by the same threads just before it, and with the
operations per second that the same products make in the cache: the roofline is the lower of the two.

Run: python benchmarks/attention.py
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import torch
from machine import describe
from peers.bandwidth import ReadBandwidth

from crosspool.kernels.numba.attention import attend, attend_split, attention_mine_bytes, attention_room_bytes
from crosspool.kernels.numba.attention_block import AttentionShape
from crosspool.kernels.numba.batch import BLOCK, KvPlace, Pass
from crosspool.kernels.numba.elements import BFLOAT16
from crosspool.kernels.numba.linear import multiply_rows
from crosspool.kernels.numba.matrix import Matrix
from crosspool.kernels.numba.team import SHARED_WORDS, claim, meet, new_own, share

BYTES = 2
"""Of an element of bfloat16."""


class Geometry(NamedTuple):
    """Of one layer. A latent (``rank`` > 0) is one key whose first ``rank`` elements are the value."""

    heads: int
    kv_heads: int
    width: int
    rank: int = 0

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one position."""
        return self.kv_heads * self.width * BYTES * (1 if self.rank else 2)

    @property
    def operations(self) -> int:
        """Multiplications and additions of one query and one position."""
        return 2 * self.heads * (self.width + (self.rank or self.width))

    def shape(self, tokens_per_page: int) -> AttentionShape:
        row = self.kv_heads * self.width * BYTES
        offset = 0 if self.rank else tokens_per_page * row
        values = self.rank or self.width
        head, scale = self.width * BYTES, self.width**-0.5
        return AttentionShape(self.heads, self.kv_heads, self.width, values, offset, row, head, scale)


GEOMETRIES = {
    "gqa 32/4 x 128": Geometry(32, 4, 128),
    "gqa 16/2 x 128": Geometry(16, 2, 128),
    "gqa 9/3 x 64": Geometry(9, 3, 64),
    "mla 16 x (512 + 64)": Geometry(16, 1, 576, 512),
}


@numba.njit(nogil=True)
def go_round(shared, own, shape, batch, tables, places, query, room, mine, attended, first, count) -> None:
    """Attention of ``count`` layers from number ``first`` on of a ring of [pass][layer]; the passes differ in
    their page tables."""
    for number in range(first, first + count):
        batch.tables[:] = tables[number // len(places) % len(tables)]
        kv = places[number % len(places)]
        attend(shared, own, shape, batch, kv, query, room, mine, attended)
        share(own, batch.queries * shape.heads)
        unit = claim(shared, own)
        while unit >= 0:
            attend_split(shape, batch, kv, unit // shape.heads, unit % shape.heads, room, mine, attended)
            unit = claim(shared, own)
        meet(shared, own)


@numba.njit(nogil=True)
def multiply(matrix, x, count, out, rounds) -> None:
    """One matrix by ``count`` vectors, from the cache."""
    for _ in range(rounds):
        multiply_rows(matrix, 0, matrix.rows, x, BFLOAT16, count, out, 4 * matrix.rows)


def seconds(function: Callable[..., object], shares: list[tuple[object, ...]]) -> float:
    threads = [threading.Thread(target=function, args=share) for share in shares]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


class Arena:
    """Random KV of one geometry: pages of ``layers`` layers, handed out in random order."""

    def __init__(self, geometry: Geometry, options: argparse.Namespace) -> None:
        self.geometry, self.options = geometry, options
        region = options.tokens_per_page * geometry.token_bytes
        self.page_bytes = options.layers * region
        self.pages = options.gibibytes * 2**30 // self.page_bytes
        memory = mmap.mmap(-1, self.pages * self.page_bytes)
        if not options.small_pages:
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(memory, dtype=torch.bfloat16)
        some = torch.randn(2**22 + 1).bfloat16()
        for part in self.memory.split(len(some)):
            part.copy_(some[: len(part)])
        self.places = tuple(
            KvPlace(self.memory.data_ptr(), self.page_bytes, layer * region, options.tokens_per_page, 0, 0)
            for layer in range(options.layers)
        )

    def tables(self, rows: int, positions: int) -> list[np.ndarray]:
        """Page tables of sequences that fill the arena."""
        chunks = -(-positions // self.options.tokens_per_page)
        order = np.random.default_rng(0).permutation(self.pages)
        tables = [order[i : i + chunks].copy() for i in range(0, self.pages - chunks + 1, chunks)]
        if len(tables) < rows:
            raise SystemExit(f"{rows} rows of {positions:,} positions do not fit {self.pages:,} pages")
        return tables[: len(tables) // rows * rows]


class Team:
    """Goes round an arena's ring, on from where it stopped."""

    def __init__(self, arena: Arena, rows: int, positions: int) -> None:
        o = arena.options
        self.keep = arena.tables(rows, positions)
        self.tables = np.array([table.ctypes.data for table in self.keep]).reshape(-1, rows)
        starts, firsts, none = np.arange(rows + 1), np.full(rows, positions - 1), np.empty(0, np.float32)
        fixed = (rows, rows, BFLOAT16, 0, starts, firsts, starts[:rows])
        self.passes = [Pass(*fixed, self.tables[0].copy(), 1, none, none, 0) for _ in range(o.threads)]
        self.shape, self.places = arena.geometry.shape(o.tokens_per_page), arena.places
        self.query = torch.randn(rows, arena.geometry.heads, arena.geometry.width).bfloat16()
        self.attended = torch.empty(rows, arena.geometry.heads, self.shape.value_width).bfloat16()
        self.shared = np.zeros(SHARED_WORDS, np.int64)
        self.own = [new_own(i, o.threads) for i in range(o.threads)]
        self.room = np.zeros(attention_room_bytes(self.shape), np.uint8)
        self.mine = [np.zeros(attention_mine_bytes(self.shape, rows), np.uint8) for _ in range(o.threads)]
        self.layer_bytes = rows * positions * arena.geometry.token_bytes
        self.operations = rows * positions * arena.geometry.operations
        self.next = 0

    def run(self, count: int) -> float:
        """Seconds of ``count`` layers."""
        query, attended = self.query.data_ptr(), self.attended.data_ptr()
        shares: list[tuple[object, ...]] = [
            (
                *(self.shared.ctypes.data, own, self.shape, batch, self.tables, self.places, query),
                *(self.room.ctypes.data, mine.ctypes.data, attended, self.next, count),
            )
            for own, batch, mine in zip(self.own, self.passes, self.mine, strict=True)
        ]
        self.next += count
        return seconds(go_round, shares)


def operations_per_second(geometry: Geometry, threads: int) -> float:
    """Of a block's keys, in the cache, by the query heads that share them, on all threads."""
    group, rounds = geometry.heads // geometry.kv_heads, 2000
    keys = torch.randn(BLOCK, geometry.width).bfloat16()
    queries = torch.randn(group, geometry.width).bfloat16()
    outs = [np.empty((group, BLOCK), np.float32) for _ in range(threads)]
    x = queries.data_ptr() + queries.stride(0) * BYTES * np.arange(group)
    stride = geometry.width * BYTES
    matrix = Matrix(keys.data_ptr(), stride, BLOCK, geometry.width, BFLOAT16, 0)
    shares: list[tuple[object, ...]] = [(matrix, x, group, out.ctypes.data, rounds) for out in outs]
    seconds(multiply, [(*share[:-1], 1) for share in shares])
    took = statistics.median(seconds(multiply, shares) for _ in range(5))
    return threads * rounds * 2 * group * BLOCK * geometry.width / took


def measure(name: str, arena: Arena, bandwidth: ReadBandwidth, rows: int, positions: int) -> None:
    o = arena.options
    team = Team(arena, rows, positions)
    arithmetic = operations_per_second(arena.geometry, o.threads)
    count = max(1, round(o.window_bytes / team.layer_bytes))
    team.run(1)
    rates, limits, shares = [], [], []
    for _ in range(o.windows):
        limit = bandwidth.window()[o.threads]
        took = team.run(count) / count
        rates.append(team.layer_bytes / took)
        limits.append(limit)
        shares.append(max(team.layer_bytes / limit, team.operations / arithmetic) / took)
    rate, limit, reached = (statistics.median(values) for values in (rates, limits, shares))
    bound = "bandwidth" if team.layer_bytes / limit > team.operations / arithmetic else "arithmetic"
    print(
        f"{name:20} {rows} x {positions:7,}: {team.layer_bytes / rate * 1e6:8.0f} us, {rate / 1e9:5.1f} of "
        f"{limit / 1e9:5.1f} GB/s, {team.operations * rate / team.layer_bytes / 1e9:5.0f} of "
        f"{arithmetic / 1e9:5.0f} GFLOP/s, {reached:.2f} of the roofline ({bound})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument("--positions", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    for option, value in (("threads", 2), ("tokens-per-page", 24), ("layers", 4), ("gibibytes", 2)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--window-bytes", type=int, default=2**29, help="read in one window, about")
    parser.add_argument("--small-pages", action="store_true", help="do not ask for huge pages")
    o = parser.parse_args()
    print(describe(), vars(o))
    bandwidth = ReadBandwidth((o.threads,))
    for name in o.geometries:
        arena = Arena(GEOMETRIES[name], o)
        for positions in o.positions:
            for rows in o.rows:
                measure(name, arena, bandwidth, rows, positions)


if __name__ == "__main__":
    main()
