"""Rows that a kernel stores into another GPU's memory, and the flags that say that they are there.

A flag is a count of what has crossed one way, from one team of a lane to another. It only ever grows: the
sender knows how often it has ``sent``, the receiver how much it has ``taken``, and waits until the sender has
``raised`` the count beyond that, in the receiver's memory. So no flag is reset, and none is missed.

Why the rows are there when the flag is (PTX ISA, memory consistency model): a program's stores come before
its arrival; arrivals are acquired and released at gpu scope, so that all programs' stores come before the
last one's exchange, which releases them at system scope; the receiver acquires that at system scope. Each
step synchronises, and causality order is transitive: it holds for whatever the last program has seen, not
for its own stores alone. Launches before, in the same stream, come before all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton.product import is_last
from crosspool.kernels.triton.words import FAILED, QUERIES, ROWS

_ROWS, _QUERIES, _FAILED = tl.constexpr(ROWS), tl.constexpr(QUERIES), tl.constexpr(FAILED)

RAISED, TAKEN, SENT = 0, 16, 32
FLAG_WORDS = 48
"""int64 words of a team for each other one, on lines of their own: how much the other has RAISED and the team
has TAKEN, and how much the team has SENT."""

_RAISED, _TAKEN = tl.constexpr(RAISED), tl.constexpr(TAKEN)
_FLAG_WORDS = tl.constexpr(FLAG_WORDS)
_BLOCK = tl.constexpr(2048)

MOST_LOOKS = 1 << 24
"""A look takes most of a microsecond, so a wait ends after ten seconds or so."""

Carried = Sequence[tuple[Tensor, Tensor]]
"""Tensors [T, ...] of the receiver and of the sender, of which those of the pass's queries cross."""


class Flag(NamedTuple):
    """One way between two teams, int64 [1] each: see above. ``arrivals``, int32 [1] of the sender, is 0."""

    sent: Tensor
    raised: Tensor
    taken: Tensor
    arrivals: Tensor


def send(lane: Tensor, carried: Carried, sizes: Tensor | None, flag: Flag) -> None:
    """Store rows into the receiver's memory, and then raise the flag. ``lane`` are the sender's words;
    ``sizes``, if given, the receiver's, which are told ROWS and QUERIES. A lane that has FAILED sends
    nothing."""
    for number, (target, source) in enumerate(carried, 1):
        _send[(len(source),)](
            lane,
            target,
            source,
            lane if sizes is None else sizes,
            flag.sent,
            flag.raised,
            flag.arrivals,
            WIDTH=source[0].numel(),
            PROGRAMS=len(source),
            TELLS=sizes is not None,
            RAISES=number == len(carried),
            num_warps=4,
        )


def receive(lane: Tensor, flag: Flag, most_looks: int = MOST_LOOKS) -> None:
    """Wait until the sender has raised the flag: what is launched afterwards finds the rows. The lane whose
    words are ``lane`` has FAILED if that takes more than ``most_looks``, and then it waits no more."""
    _receive[(1,)](lane, flag.raised, flag.taken, most_looks, num_warps=1)


def settle(lane: Tensor, flags: Tensor, *, failed: bool) -> None:
    """Nothing is under way to this team (``flags`` int64 [teams, FLAG_WORDS]): it has taken whatever there
    was, and the lane has not failed; or it is to be as if it had, so that nothing is waited for."""
    _settle[(len(flags),)](lane, flags, int(failed), num_warps=1)


@triton.jit
def _send(
    lane,
    target,
    source,
    sizes,
    sent,
    raised,
    arrivals,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TELLS: tl.constexpr,
    RAISES: tl.constexpr,
):
    """One program a row."""
    if tl.load(lane + _FAILED) != 0:
        return
    query, queries = tl.program_id(0), tl.load(lane + _QUERIES)
    if query < queries:
        row = query.to(tl.int64) * WIDTH
        for begin in range(0, WIDTH, _BLOCK):
            at = begin + tl.arange(0, _BLOCK)
            values = tl.load(source + row + at, at < WIDTH, 0)
            tl.store(target + row + at, values, at < WIDTH)
    if RAISES:
        if TELLS:
            tl.store(sizes + _ROWS, tl.load(lane + _ROWS), query == 0)
            tl.store(sizes + _QUERIES, queries, query == 0)
        if is_last(arrivals, PROGRAMS):
            number = tl.load(sent) + 1
            tl.store(sent, number)
            tl.atomic_xchg(raised, number, sem="release", scope="sys")


@triton.jit(do_not_specialize=["most_looks"])
def _receive(lane, raised, taken, most_looks):
    if tl.load(lane + _FAILED) != 0:
        return
    number = tl.load(taken) + 1
    looks = 0
    seen = tl.atomic_add(raised, 0, sem="acquire", scope="sys")
    while (seen < number) & (looks < most_looks):
        seen = tl.atomic_add(raised, 0, sem="acquire", scope="sys")
        looks += 1
    if seen < number:
        tl.store(lane + _FAILED, 1)
    else:
        tl.store(taken, number)


@triton.jit(do_not_specialize=["failed"])
def _settle(lane, flags, failed):
    """One program for each team that may send."""
    own = flags + tl.program_id(0) * _FLAG_WORDS
    tl.store(own + _TAKEN, tl.load(own + _RAISED))
    tl.store(lane + _FAILED, failed.to(tl.int64))
