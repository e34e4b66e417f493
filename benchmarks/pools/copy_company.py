"""What copies to host memory and back cost the tokens of others: one stream decodes, with and without a
copier at work beside it, in turns.

    PYTHONPATH=src:benchmarks python benchmarks/pools/copy_company.py FOLDER [--rounds 6]

The copier is that of the engine (workers/copier.py), copying pages of its own all the time: a real sequence's
copy is over in milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import threading
from pathlib import Path

import numpy as np
import torch
from machine import describe

from crosspool.build.start import start_engine
from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig
from crosspool.core.copies import Direction, PageCopy
from crosspool.core.ids import CopyId, HostPage, PageId, RequestId
from crosspool.engine.engine import Engine
from crosspool.workers.copier import HostCopier
from engine import request, run

PAGES, PAGE_BYTES, AT_ONCE = 4096, 131_072, 256


class Busy:
    """A copier with always one copy in flight and one waiting."""

    def __init__(self) -> None:
        self._copier = HostCopier(*(torch.zeros(PAGES, PAGE_BYTES, dtype=torch.uint8) for _ in range(2)))
        self._ids, self._places = itertools.count(), itertools.cycle(range(0, PAGES, AT_ONCE))
        self._stop, self.bytes, self.nanoseconds = threading.Event(), 0, 0
        self._more = threading.Semaphore(2)
        self._copier.start(self._more.release)
        self._thread = threading.Thread(target=self._feed)
        self._thread.start()

    def close(self) -> float:
        """Returns GB copied in a second of copying."""
        self._stop.set()
        self._more.release()
        self._thread.join()
        self._copier.close()
        return self.bytes / max(1, self.nanoseconds)

    def _feed(self) -> None:
        while not self._stop.is_set():
            self._more.acquire()
            for event in self._copier.take():
                self.bytes += AT_ONCE * PAGE_BYTES
                self.nanoseconds += event.time
            number, first = next(self._ids), next(self._places)
            pages = range(first, first + AT_ONCE)
            direction = Direction.OUT if number % 2 else Direction.IN
            copy = PageCopy(
                CopyId(number),
                RequestId(number),
                direction,
                tuple(map(PageId, pages)),
                tuple(map(HostPage, pages)),
                AT_ONCE * PAGE_BYTES,
            )
            self._copier.copy(copy)


def gaps(engine: Engine, rng: random.Random, output: int) -> list[float]:
    """Milliseconds between the tokens of one stream."""
    (times,) = run(engine, [request(engine, rng, 64, output)]).values()
    made: list[float] = (1e3 * np.diff(times[2:])).tolist()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=int, default=200)
    o = parser.parse_args()
    print(describe(), vars(o))
    models, pools = (ModelConfig("it", str(o.folder)),), PoolConfig(kv_pool_bytes=2**29)
    engine, rng = start_engine(EngineConfig(models, pools, threads=2)), random.Random(0)
    medians: dict[str, list[float]] = {"p50": [], "p99": []}
    try:
        gaps(engine, rng, 50)
        for _ in range(o.rounds):
            alone = gaps(engine, rng, o.output)
            busy = Busy()
            beside = gaps(engine, rng, o.output)
            rate = busy.close()
            for name, quantile in (("p50", 50), ("p99", 99)):
                medians[name].append(float(np.percentile(beside, quantile) / np.percentile(alone, quantile)))
            shown = [
                f"{name} {np.percentile(own, 50):.2f}, {np.percentile(own, 99):.2f}, {max(own):.2f} ms"
                for name, own in (("alone", alone), ("beside copies", beside))
            ]
            print(f"  {'; '.join(shown)}; {rate:.1f} GB/s copied", flush=True)
    finally:
        engine.close()
    print({name: round(statistics.median(own), 2) for name, own in medians.items()}, "times its TBT alone")


if __name__ == "__main__":
    main()
