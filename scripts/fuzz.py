"""Many random lives of the control plane: `make fuzz`, or one seed again with --first SEED --seeds 1."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from crosspool.scheduler.sequence import TRANSITIONS
from helpers_control_plane import Life, live


def try_live(seed: int) -> tuple[int, Life | str]:
    try:
        return seed, live(seed)
    except Exception as error:
        return seed, f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began, lives, failed = time.monotonic(), [], {}
    seeds = range(options.first, options.first + options.seeds)
    with ProcessPoolExecutor(options.processes) as pool:
        for seed, life in pool.map(try_live, seeds, chunksize=20):
            if isinstance(life, str):
                failed[seed] = life
            else:
                lives.append(life)
    moves = sum((life.moves for life in lives), Counter())
    result = {
        "seeds": len(seeds),
        "failed": len(failed),
        "seconds": round(time.monotonic() - began, 1),
        "requests": sum(life.requests for life in lives),
        "decisions_per_seed": round(sum(life.decisions for life in lives) / max(1, len(lives)), 1),
        "share_with_preemption": round(sum(life.preemptions > 0 for life in lives) / max(1, len(lives)), 3),
        "share_with_abort_in_prefill": round(
            sum(life.aborted_in_prefill > 0 for life in lives) / max(1, len(lives)), 3
        ),
        "share_with_cached_prefix": round(
            sum(life.cached_tokens > 0 for life in lives) / max(1, len(lives)), 3
        ),
        "share_with_eviction": round(sum(life.evicted_pages > 0 for life in lives) / max(1, len(lives)), 3),
        "share_with_spill": round(sum(life.spilled > 0 for life in lives) / max(1, len(lives)), 3),
        "share_with_return": round(sum(life.returned > 0 for life in lives) / max(1, len(lives)), 3),
        "share_with_cancelled_copy": round(
            sum(life.cancelled_copies > 0 for life in lives) / max(1, len(lives)), 3
        ),
        "share_with_failed_layer": round(sum(life.failures > 0 for life in lives) / max(1, len(lives)), 3),
        "share_with_pages_elsewhere": round(sum(life.spread > 0 for life in lives) / max(1, len(lives)), 3),
        "transitions": {f"{a} -> {b}": moves[a, b] for a, b in sorted(TRANSITIONS)},
    }
    print(json.dumps(result, indent=2))
    for seed, error in list(failed.items())[:10]:
        print(f"seed {seed}: {error}", file=sys.stderr)
    untaken = [move for move in TRANSITIONS if moves[move] == 0]
    return 1 if failed or (untaken and options.seeds >= 200) else 0


if __name__ == "__main__":
    sys.exit(main())
