"""Section 3: how long a word takes from the host to a kernel that waits for it and back, and from one
multiprocessor to another. All waits end by themselves after MOST_LOOKS.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
import triton
import triton.language as tl

from gpu.device import Gpu
from gpu.results import Case, Figure, NotMeasured

ROUNDS, WARM_ROUNDS = 2000, 50
MOST_LOOKS = 5_000_000
MOST_SECONDS = 10.0


@triton.jit(do_not_specialize=["rounds", "most_looks"])
def answer(bell, reply, rounds, most_looks):
    """Write each number, from 1 on, into ``reply`` once it is in ``bell``."""
    for number in range(1, rounds + 1):
        looks = 0
        while (tl.load(bell, volatile=True) < number) & (looks < most_looks):
            looks += 1
        tl.atomic_xchg(reply, number.to(tl.int64), sem="release", scope="sys")


@triton.jit(do_not_specialize=["rounds", "most_looks"])
def ping_pong(flags, rounds, most_looks):
    """Program 0 raises flag 0, program 1 answers by flag 1; flags are on lines of their own."""
    mine = tl.program_id(0)
    own, other = flags + mine * 64, flags + (1 - mine) * 64
    for number in range(1, rounds + 1):
        if mine == 0:
            tl.atomic_xchg(own, number, sem="release", scope="gpu")
        looks = 0
        while (tl.atomic_add(other, 0, sem="acquire", scope="gpu") < number) & (looks < most_looks):
            looks += 1
        if mine == 1:
            tl.atomic_xchg(own, number, sem="release", scope="gpu")


def host_to_device(gpu: Gpu) -> list[Figure]:
    bell, reply = (gpu.device.pinned((8,), torch.int64) for _ in range(2))
    written, read = bell.numpy(), reply.numpy()
    gpu.device.run(gpu.stream, lambda: answer[(1,)](bell, reply, 0, MOST_LOOKS, num_warps=1))
    gpu.device.finish()
    gpu.device.run(gpu.stream, lambda: answer[(1,)](bell, reply, ROUNDS, MOST_LOOKS, num_warps=1))
    spans, end = [], time.monotonic() + MOST_SECONDS
    for number in range(1, ROUNDS + 1):
        begin = time.perf_counter_ns()
        written[0] = number
        while read[0] < number:
            if time.monotonic() > end:
                written[0] = ROUNDS
                raise TimeoutError(f"round {number} was not answered")
        spans.append(time.perf_counter_ns() - begin)
    gpu.device.finish()
    spans = sorted(spans[WARM_ROUNDS:])
    return [
        Figure("doorbell to reply, median", statistics.median(spans) / 1e3, "us"),
        Figure("doorbell to reply, P99", spans[len(spans) * 99 // 100] / 1e3, "us"),
        Figure("of it the host's own loop", _own_loop() / 1e3, "us"),
    ]


def _own_loop() -> float:
    """Nanoseconds of a round whose reply is there at once."""
    words, spans = torch.zeros(8, dtype=torch.int64).numpy(), []
    for number in range(1, 1000):
        begin = time.perf_counter_ns()
        words[0] = number
        while words[0] < number:
            raise AssertionError("it was written")
        spans.append(time.perf_counter_ns() - begin)
    return statistics.median(spans)


def between_processors(gpu: Gpu) -> list[Figure]:
    fresh = iter(gpu.device.tensor((6, 128), torch.int32))
    used: list[torch.Tensor] = []

    def once() -> None:
        used.append(next(fresh))
        ping_pong[(2,)](used[-1], ROUNDS, MOST_LOOKS, num_warps=1)

    seconds = gpu.seconds(gpu.eager(once), rounds=5)
    last = used[-1].tolist()
    assert last[0] == last[64] == ROUNDS, f"only {last[0]} of {ROUNDS} rounds"
    return [Figure("flag from one multiprocessor to another", 1e6 * seconds / (2 * ROUNDS), "us")]


def cases(gpu: Gpu) -> list[Case]:
    def guarded(run: object) -> list[Figure]:
        if gpu.interpreted:
            raise NotMeasured("interpreted programs run one after another: nobody would answer")
        assert callable(run)
        return list(run(gpu))

    runs = {"host to device": host_to_device, "between multiprocessors": between_processors}
    return [Case(name, partial(guarded, run)) for name, run in runs.items()]
