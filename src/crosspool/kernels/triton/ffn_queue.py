"""A queue of FFN halves in device memory, and how the programs of a resident kernel serve it.

Whoever asks draws a ticket, fills the slot of that number, and publishes it. All programs of the kernel take
one entry after another, each does its share, and each counts itself in the slot's RETIRED. Only when all have
is the entry done, and only then may its slot be filled again. The counter is the slot's own: one of all that
was retired is reached by others' entries, while a slow program has not done its share.
All counters only ever grow, so that nobody has to set them back, and are of 64 bits.

The kernel ends when nobody has asked for ``patience`` looks. Programs must agree on when that is: so the end
is an **entry** like others, and what comes after it is the next launch's. Program 0 draws its ticket, but
only if no other has been drawn that is not served yet. The same word says in its lowest bit whether a launch
is open, so whoever draws after the end knows it and asks the host for the next launch, *before* publishing
its entry; whoever draws before the end keeps it from happening. No entry is lost between the two, and none is
served twice. The host launches for as long as ASKED is more than it has launched, into one stream, so that a
launch begins when the last program of the one before has ended. It may launch unasked: such a launch ends
idle.

Within an entry the programs **meet**: each counts itself in MEETINGS and waits until all have. They are all
on the chip at once, or nobody would come: a launch has no more programs than the device has multiprocessors,
and each must fit beside whatever else is there. Kernels of other streams may keep it out for as long as they
run. So every wait ends after ``most_looks``. Then the queue has FAILED, and for good: whoever waits is told,
all programs end, and nothing more is served.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

TICKETS, MEETINGS, FAILED, CLOSED, BEGIN = 0, 16, 32, 48, 49
FIRST_SLOT = 64
"""Words of 8 bytes, those that are written while others look in lines of their own. TICKETS is twice the
tickets drawn, and 1 if a launch is open. CLOSED is the last launch that has come to its end, or tries to.
BEGIN [2, 2] is where launches of each parity begin: the first entry, and how many meetings there were."""

SEQUENCE, LANE, LAYER, X, OUT = range(5)
RETIRED, SLOT_WORDS = 16, 32
"""An entry is the first 64 bytes of a slot. SEQUENCE is 1 more than its number: then the rest is there.
LANE is the address of a lane's words, 0: the launch ends here. LAYER is a number, X and OUT are addresses of
rows in model dtype, on 256 bytes."""

ASKED, LOST, NEWS_WORDS = 0, 8, 16
"""What the host reads: the launch that is asked for (the first is 1), and whether the queue has failed."""

_TICKETS: tl.constexpr = tl.constexpr(TICKETS)
_MEETINGS: tl.constexpr = tl.constexpr(MEETINGS)
_FAILED: tl.constexpr = tl.constexpr(FAILED)
_CLOSED: tl.constexpr = tl.constexpr(CLOSED)
_BEGIN: tl.constexpr = tl.constexpr(BEGIN)
_FIRST_SLOT: tl.constexpr = tl.constexpr(FIRST_SLOT)
_SEQUENCE: tl.constexpr = tl.constexpr(SEQUENCE)
_LANE: tl.constexpr = tl.constexpr(LANE)
_LAYER: tl.constexpr = tl.constexpr(LAYER)
_X: tl.constexpr = tl.constexpr(X)
_OUT: tl.constexpr = tl.constexpr(OUT)
_RETIRED: tl.constexpr = tl.constexpr(RETIRED)
_SLOT_WORDS: tl.constexpr = tl.constexpr(SLOT_WORDS)
_ASKED: tl.constexpr = tl.constexpr(ASKED)
_LOST: tl.constexpr = tl.constexpr(LOST)

LEAST_SLOTS = 2
"""The entry that ends a launch may follow one that is not retired yet, but never two."""


class FfnQueue(NamedTuple):
    """``words`` int64 on the device and ``news`` int64 [NEWS_WORDS] in pinned memory, all 0 at first. Each
    launch has ``programs``, no more than the device has multiprocessors. A wait lasts up to ``most_looks``,
    of about a microsecond each or less, which is more than ``patience`` and than the host takes to launch."""

    words: Tensor
    news: Tensor
    slots: int
    programs: int
    patience: int
    most_looks: int


def queue_words(slots: int) -> int:
    """How many words a queue has. Raises ValueError for fewer slots than the protocol needs."""
    if slots < LEAST_SLOTS:
        raise ValueError(f"a queue of {slots} slots; {LEAST_SLOTS} is the least")
    return FIRST_SLOT + slots * SLOT_WORDS


def ask(queue: FfnQueue, lane: Tensor, layer: int, x: Tensor, out: Tensor) -> None:
    """Launch a kernel that enters one FFN half and waits until it is done, so that what follows in the stream
    has it. It can be recorded. If the queue has failed, or fails, nothing is computed and ``news`` says so.
    """
    _ask[(1,)](
        queue.words,
        queue.news,
        lane,
        layer,
        x,
        out,
        queue.programs,
        queue.most_looks,
        SLOTS=queue.slots,
        num_warps=1,
    )


def launches_asked_for(queue: FfnQueue, launched: int) -> int:
    """How many launches the host owes, of so many that it has made. Raises RuntimeError if the queue has
    failed."""
    if int(queue.news[LOST]):
        raise RuntimeError("the resident FFN kernel waited too long for a program or an entry")
    return max(int(queue.news[ASKED]) - launched, 0)


@triton.jit(do_not_specialize=["layer", "programs", "most_looks"])
def _ask(queue, news, lane, layer, x, out, programs, most_looks, SLOTS: tl.constexpr):
    if look(queue + _FAILED) == 0:
        drawn = tl.atomic_add(queue + _TICKETS, 2, sem="acq_rel", scope="gpu")
        sequence = drawn // 2
        if drawn % 2 == 0:
            closed = tl.load(queue + _CLOSED, volatile=True)
            tl.atomic_xchg(news + _ASKED, closed + 1, sem="release", scope="sys")
        slot = slot_of(queue, sequence, SLOTS)
        before = sequence // SLOTS * programs
        served = comes_to(slot + _RETIRED, before, most_looks)
        if served:
            tl.store(slot + _LANE, lane.to(tl.int64))
            tl.store(slot + _LAYER, layer)
            tl.store(slot + _X, x.to(tl.int64))
            tl.store(slot + _OUT, out.to(tl.int64))
            publish(slot, sequence)
            served = comes_to(slot + _RETIRED, before + programs, most_looks)
        if not served:
            fail(queue, news)


@triton.jit
def look(word):
    """A word as it is now; what was written before it was released is seen from now on."""
    return tl.atomic_add(word, 0, sem="acquire", scope="gpu")


@triton.jit
def comes_to(word, value, most_looks):
    """Wait until a counter is ``value`` or more. False if it is not after so many looks."""
    looks = 0
    while (looks < most_looks) & (look(word) < value):
        looks += 1
    tl.debug_barrier()
    return looks < most_looks


@triton.jit
def slot_of(queue, sequence, SLOTS: tl.constexpr):
    return queue + _FIRST_SLOT + sequence % SLOTS * _SLOT_WORDS


@triton.jit
def publish(slot, sequence):
    """What this program has written into a slot is an entry from now on."""
    tl.debug_barrier()
    tl.atomic_xchg(slot + _SEQUENCE, sequence + 1, sem="release", scope="gpu")


@triton.jit
def fail(queue, news):
    """Nobody is to wait any more."""
    tl.atomic_xchg(queue + _FAILED, 1, sem="release", scope="gpu")
    tl.atomic_xchg(news + _LOST, 1, sem="release", scope="sys")


@triton.jit
def begin_launch(queue, launch):
    """The first entry of this launch, and how many meetings there have been; it is open from now on."""
    begin = queue + _BEGIN + 2 * (launch % 2)
    sequence, met = tl.load(begin), tl.load(begin + 1)
    if tl.program_id(0) == 0:
        tl.atomic_add(queue + _TICKETS, 1, sem="acq_rel", scope="gpu")
    return sequence, met


@triton.jit
def take(queue, launch, sequence, met, patience, most_looks, SLOTS: tl.constexpr):
    """Wait for an entry. False if there is none after ``most_looks``. At every ``patience`` looks program 0
    tries to end the launch."""
    slot = slot_of(queue, sequence, SLOTS)
    looks = 0
    while (looks < most_looks) & (look(slot + _SEQUENCE) <= sequence):
        looks += 1
        if (tl.program_id(0) == 0) & (looks % patience == 0):
            _close(queue, slot, launch, sequence, met)
    tl.debug_barrier()
    return looks < most_looks


@triton.jit
def _close(queue, slot, launch, sequence, met):
    """Enter the end of the launch, unless a ticket has been drawn that was not served.

    A program may begin when the others have ended already: so the next launch's begin is in other words than
    this one's. The slot is free: all programs have met since its last entry.
    """
    begin = queue + _BEGIN + 2 * ((launch + 1) % 2)
    tl.store(begin, sequence + 1)
    tl.store(begin + 1, met)
    tl.store(queue + _CLOSED, launch)
    tl.debug_barrier()
    opened = 2 * sequence + 1
    if tl.atomic_cas(queue + _TICKETS, opened, opened + 1, sem="acq_rel", scope="gpu") == opened:
        tl.store(slot + _LANE, tl.zeros_like(sequence))
        publish(slot, sequence)


@triton.jit
def arrive(queue):
    """This program is at its next meeting: what it has stored is seen by all that meet it there."""
    tl.debug_barrier()  # All of this program's threads have stored before one of them says so.
    tl.atomic_add(queue + _MEETINGS, 1, sem="release", scope="gpu")


@triton.jit
def await_all(queue, number, most_looks):
    """Wait until all programs are at the meeting of this number, the first of which is 1. False after too
    many looks."""
    return comes_to(queue + _MEETINGS, number * tl.num_programs(0), most_looks)


@triton.jit
def retire(slot):
    """This program reads nothing more of an entry, and has stored its share."""
    tl.debug_barrier()
    tl.atomic_add(slot + _RETIRED, 1, sem="release", scope="gpu")
