"""How much of what could be reused the prefix cache reuses: a trace of conversations in virtual time.

The real pool, page tables and keys; every request holds its pages from its arrival until its last token, with
prefill and decode at fixed speeds. First with a pool in which nothing is ever evicted, then with parts of the
pages that were in use at the end of that, where the cache is compared with plain LRU.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pyarrow.parquet as parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import describe

from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.core.kv_layout import KvLayout, LayerGroup
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.pools.kv import KvPool
from crosspool.pools.prefix_cache import CachedChunk, PrefixCache
from crosspool.scheduler.prefixes import Prefixes
from crosspool.scheduler.sequence import Sequence

TRACE = Path(__file__).resolve().parent.parent / "data" / "mooncake_conversation.parquet"
BLOCK_TOKENS = 512
FIRST_OUTPUT_TOKEN = 1 << 31
"""Above every id of a block: what a request answers is in nobody's prompt but as a block of its own."""

MODEL, DEVICE = ModelIndex(0), KvDevice(0)


class PlainLru(PrefixCache):
    """The chunks least recently used go first; of those of one prompt the first, which was touched first."""

    def __init__(self, places: DevicePages) -> None:
        super().__init__(places)
        self.now = 0.0
        self._order: list[tuple[float, int, CachedChunk]] = []
        self._rested: dict[bytes, int] = {}
        self._counter = count()

    def rest(self, chunk: CachedChunk) -> None:
        super().rest(chunk)
        self._rested[chunk.key] = ticket = -next(self._counter)
        heapq.heappush(self._order, (self.now, ticket, chunk))

    def evict(self, device: KvDevice | None = None) -> CachedChunk:
        while True:
            _, ticket, chunk = heapq.heappop(self._order)
            if self._rested.get(chunk.key) == ticket and self.is_resting(chunk):
                self._resting.move_to_end(chunk.key, last=False)
                return super().evict(device)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of the trace."""

    at: float
    prompt_tokens: int
    output_tokens: int
    reusable: int
    blocks: tuple[int, ...]

    def prompt(self) -> tuple[int, ...]:
        """Token ids: those of a block are its id."""
        return tuple(block for block in self.blocks for _ in range(BLOCK_TOKENS))[: self.prompt_tokens]


def read_trace(path: Path) -> list[Turn]:
    columns = ("t_seconds", "prompt_tokens", "output_tokens", "reusable_prefix_tokens", "block_hashes")
    table = parquet.read_table(path, columns=list(columns)).to_pydict()
    rows = zip(*(table[name] for name in columns), strict=True)
    return [
        Turn(at, prompt, output, reusable, tuple(blocks)) for at, prompt, output, reusable, blocks in rows
    ]


class Replay:
    """The trace through one pool. Times are in seconds."""

    def __init__(
        self, pages: int, tokens_per_page: int, cache: type[PrefixCache], speeds: tuple[float, float]
    ) -> None:
        layout = KvLayout(1, tokens_per_page, (LayerGroup((0,), None),), 1, (0,), (0,))
        self.pool = KvPool({MODEL: layout}, DevicePages.of([pages]), step_tokens=1, prefix_secret=b"s" * 32)
        self.pool._cache = cache(self.pool.places)
        self._prefixes = Prefixes(self.pool)
        self._prefill_time, self._decode_time = 1 / speeds[0], speeds[1]
        self._outputs: dict[RequestId, tuple[int, ...]] = {}

    def run(self, turns: list[Turn]) -> Iterator[tuple[Turn, int]]:
        """Each request and how many of its tokens were cached when it came."""
        ends: list[tuple[float, int, Sequence, bool]] = []
        for identity, turn in enumerate(turns):
            while ends and ends[0][0] <= turn.at:
                self._go_on(ends)
            self._at(turn.at)
            sequence = self._begin(identity, turn)
            cached = sequence.cached_tokens
            read = turn.at + (turn.prompt_tokens - cached) * self._prefill_time
            heapq.heappush(ends, (read, identity, sequence, False))
            yield turn, cached
        while ends:
            self._go_on(ends)
        self.pool.check([])

    def _at(self, now: float) -> None:
        cache = self.pool._cache
        if isinstance(cache, PlainLru):
            cache.now = now

    def _begin(self, identity: int, turn: Turn) -> Sequence:
        request = Request(
            id=RequestId(identity),
            model=MODEL,
            prompt_token_ids=turn.prompt(),
            sampling=SamplingParams(),
            max_tokens=turn.output_tokens,
            seed=0,
            stop_token_ids=frozenset(),
            arrival=Nanoseconds(0),
        )
        sequence = Sequence(request, Nanoseconds(0), Nanoseconds(0), Counter())
        sequence.table = self.pool.open(MODEL, DEVICE)
        self._prefixes.take_over(sequence)
        if not self.pool.grow(sequence.table, turn.prompt_tokens + turn.output_tokens):
            raise SystemExit(f"a pool of {self.pool.total} pages does not hold what runs at {turn.at:.0f} s")
        return sequence

    def _go_on(self, ends: list[tuple[float, int, Sequence, bool]]) -> None:
        """The next request that has read its prompt or made its last token."""
        now, identity, sequence, ended = heapq.heappop(ends)
        self._at(now)
        if not ended:
            sequence.computed = sequence.known
            self._prefixes.publish(sequence)
            last = now + sequence.request.max_tokens * self._decode_time
            heapq.heappush(ends, (last, identity, sequence, True))
            return
        first = FIRST_OUTPUT_TOKEN + identity
        sequence.output = [first] * sequence.request.max_tokens
        sequence.computed = sequence.known - 1
        self._prefixes.publish(sequence)
        assert sequence.table is not None
        self.pool.release(sequence.table)


def measure(
    turns: list[Turn], pages: int, cache: type[PrefixCache], options: argparse.Namespace
) -> dict[str, object]:
    replay = Replay(pages, options.tokens_per_page, cache, (options.prefill_tps, options.tbt_ms / 1000))
    began = time.perf_counter()
    hit = sum(min(cached, turn.reusable) for turn, cached in replay.run(turns))
    reusable = sum(turn.reusable for turn in turns)
    return {
        "cache": "plain LRU" if cache is PlainLru else "CrossPool",
        "pages": pages,
        "pages_used": pages - replay.pool.free,
        "pages_evicted": replay.pool.evicted[MODEL],
        "share_of_reusable": round(hit / reusable, 4),
        "share_of_prompts": round(hit / sum(turn.prompt_tokens for turn in turns), 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--tokens-per-page", type=int, default=64)
    parser.add_argument("--prefill-tps", type=float, default=8000.0, help="of each request by itself")
    parser.add_argument("--tbt-ms", type=float, default=40.0)
    parser.add_argument("--fractions", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    turns = read_trace(options.trace)
    most = sum(-(-(turn.prompt_tokens + turn.output_tokens) // options.tokens_per_page) for turn in turns)
    rows = [measure(turns, most, PrefixCache, options)]
    enough = int(str(rows[0]["pages_used"]))
    for fraction in options.fractions:
        rows += [
            {"fraction": f"1/{fraction}", **measure(turns, enough // fraction, cache, options)}
            for cache in (PrefixCache, PlainLru)
        ]
    text = json.dumps({"machine": describe(), "pools": rows}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
