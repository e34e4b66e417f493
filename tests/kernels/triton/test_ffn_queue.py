"""The queue of resident programs, between processes: everything that is asked for is done once, by all
programs, however slow some of them are and however often they have ended meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import ffn_queue
from crosspool.kernels.triton.ffn_queue import (
    ASKED,
    FAILED,
    LOST,
    FfnQueue,
    arrive,
    ask,
    await_all,
    begin_launch,
    fail,
    launches_asked_for,
    look,
    queue_words,
    retire,
    slot_of,
    take,
)
from helpers_triton_gates import needs_interpreter
from helpers_triton_programs import SECONDS, Crew, shared, shared_queue

pytestmark = [pytest.mark.backend, needs_interpreter]

_LANE: tl.constexpr = tl.constexpr(ffn_queue.LANE)
_LAYER: tl.constexpr = tl.constexpr(ffn_queue.LAYER)
_X: tl.constexpr = tl.constexpr(ffn_queue.X)
_OUT: tl.constexpr = tl.constexpr(ffn_queue.OUT)
_FAILED: tl.constexpr = tl.constexpr(FAILED)

PROGRAMS, BURST = 3, 5


@triton.jit
def sum_up(queue, news, launch, patience, most_looks, shares, SLOTS: tl.constexpr, PROGRAMS: tl.constexpr):
    """The loop of a resident kernel. Each program has a share of ``x + layer``; then each adds all shares to
    a number of its own in ``out``, so that one who sees less than all, or does it twice, is seen there."""
    sequence, met = begin_launch(queue, launch)
    in_time = True
    serving = look(queue + _FAILED) == 0
    while serving:
        in_time = take(queue, launch, sequence, met, patience, most_looks, SLOTS)
        slot = slot_of(queue, sequence, SLOTS)
        serving = in_time & (tl.load(slot + _LANE) != 0)
        if serving:
            x = tl.load(slot + _X).to(tl.pointer_type(tl.int64))
            out = tl.load(slot + _OUT).to(tl.pointer_type(tl.int64)) + tl.program_id(0)
            own = (tl.load(x) + tl.load(slot + _LAYER)) * (tl.program_id(0) + 1)
            tl.store(shares + tl.program_id(0), own)
            arrive(queue)
            in_time = await_all(queue, met + 1, most_looks)
            total = tl.load(shares)
            for other in tl.static_range(1, PROGRAMS):
                total += tl.load(shares + other)
            if in_time:
                arrive(queue)
                in_time = await_all(queue, met + 2, most_looks)
            met += 2
            if in_time:
                tl.store(out, tl.load(out) + total)
        if in_time:
            retire(slot)
        serving = serving & in_time
        sequence += 1
    if not in_time:
        fail(queue, news)


def server(queue: FfnQueue) -> Callable[[int], None]:
    shares = shared(torch.zeros(queue.programs, dtype=torch.int64))

    def serve(launch: int) -> None:
        sum_up[(queue.programs,)](
            queue.words,
            queue.news,
            launch,
            queue.patience,
            queue.most_looks,
            shares,
            SLOTS=queue.slots,
            PROGRAMS=queue.programs,
        )

    return serve


def asker(queue: FfnQueue, number: int, entries: int, together: Barrier) -> Callable[[], None]:
    """Asks one thing after another, and sees the result of each when it goes on. After every few it rests,
    when the others do: so launches end, and some ask just then."""
    lane, x = shared(torch.zeros(16, dtype=torch.int64)), shared(torch.zeros(1, dtype=torch.int64))
    out = shared(torch.zeros(entries, queue.programs, dtype=torch.int64))

    def run() -> None:
        rests = random.Random(number)
        for entry in range(entries):
            x[0] = 1000 * number + entry
            ask(queue, lane, entry % 7, x, out[entry])
            wanted = int(x[0] + entry % 7) * queue.programs * (queue.programs + 1) // 2
            assert out[entry].eq(wanted).all(), f"entry {entry} of {number}: {out[entry]}, not {wanted}"
            if entry % BURST == BURST - 1:
                together.wait(SECONDS)
                time.sleep(0.05 * rests.random())
        assert_once(out, number)

    return run


def assert_once(out: Tensor, number: int) -> None:
    """At the end too: nothing was done again later."""
    entries, programs = out.shape
    own = torch.arange(entries) % 7 + 1000 * number + torch.arange(entries)
    assert out.eq((own * (programs * (programs + 1) // 2))[:, None]).all()


@pytest.mark.parametrize(
    ("slots", "askers", "entries", "delay"),
    [(2, 4, 40, 0.002), (4, 3, 40, 0.002), (2, 1, 80, 0.0)],
)
def test_everything_is_done_once_by_all(slots: int, askers: int, entries: int, delay: float) -> None:
    """Launches end many times meanwhile, for programs are not patient."""
    queue = shared_queue(slots, PROGRAMS, patience=3)
    together = get_context("fork").Barrier(askers)
    asking = [asker(queue, number, entries, together) for number in range(askers)]
    launches = Crew(queue, server(queue), delay=delay).run(asking)
    assert launches > entries // BURST // 4
    assert int(queue.news[ASKED]) == launches and not int(queue.news[LOST])


def test_who_waits_too_long_is_told_and_nothing_more_is_served() -> None:
    """One program never comes: the others give up, and so does everybody who asks then."""
    queue = shared_queue(2, PROGRAMS, most_looks=200)
    out, lane = shared(torch.zeros(2, PROGRAMS, dtype=torch.int64)), torch.zeros(16, dtype=torch.int64)

    def twice() -> None:
        for row in out:
            ask(queue, lane, 0, lane, row)

    Crew(queue, server(queue), absent=[1]).run([twice])
    assert out.eq(0).all()
    assert int(queue.words[FAILED]) == int(queue.news[LOST]) == 1
    assert int(queue.words[ffn_queue.TICKETS]) // 2 == 1, "who asked of a failed queue has drawn a ticket"
    with pytest.raises(RuntimeError, match="waited too long"):
        launches_asked_for(queue, 0)


def test_an_entry_that_nobody_serves_is_given_up() -> None:
    queue = shared_queue(2, PROGRAMS, most_looks=5)
    words = torch.zeros(PROGRAMS, dtype=torch.int64)
    ask(queue, words, 0, words, words)
    assert int(queue.news[ASKED]) == 1 and int(queue.news[LOST]) == 1


def test_the_first_to_ask_and_who_asks_after_the_end_ask_for_a_launch() -> None:
    queue = shared_queue(2, 1)
    assert launches_asked_for(queue, 0) == 0
    queue.news[ASKED] = 3
    assert [launches_asked_for(queue, launched) for launched in (1, 3, 4)] == [2, 0, 0]


def test_a_queue_of_one_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="a queue of 1 slots; 2 is the least"):
        queue_words(1)
