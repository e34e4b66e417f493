"""Compiles the stages that every model runs through, where the cache folder does not have them yet.

The first start of a server does the same. Tests that start many are quicker, and within their time limits,
with the code there.
"""

from __future__ import annotations

import time

from crosspool.workers.resident.run import stage_addresses


def main() -> None:
    begin = time.perf_counter()

    def report(done: int, total: int) -> None:
        print(f"{done} of {total} compiled, {time.perf_counter() - begin:.0f} s", flush=True)

    stage_addresses(report)


if __name__ == "__main__":
    main()
