"""Which unit goes into its lane's streams next: core/pick.py, over what is in flight at one home.

A decode's pass is one unit: its kernels follow each other without the host, before those of prompts wherever
both have work, for its stream is the more urgent one. Of a loop that makes pass after pass, one begins when
the host hears of the tokens of the one before. A prompt chunk goes layer task by layer task, few of
them ahead, so that what the rule says of a chunk's next one is said just before it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from crosspool.core.order_rule import already_passed, note_chunk, pick_one
from crosspool.core.pick import NOTHING
from crosspool.workers.cuda.flight import Flight, FlightLane
from crosspool.workers.cuda.lanes import Lane


def next_unit(flights: Collection[Flight], lanes: Iterable[Lane], now: int) -> Flight | None:
    """The flight whose next unit is to be put into a stream at ``now``, with its lane, or None.

    ``lanes`` are those of the flights' home.
    """
    waiting = list(flights)
    chosen_lanes = [_lane_for(flight, lanes) for flight in waiting]
    ready = [int(lane is not None) for lane in chosen_lanes]
    if not any(ready):
        return None
    chosen = pick_one(ready, waiting, now)
    if chosen == NOTHING:
        return None
    flight, lane = waiting[chosen], chosen_lanes[chosen]
    assert lane is not None
    if flight.lane is None:
        lane.bind(flight)
    return flight


def note_unit(flight: Flight, flights: Collection[Flight], now: int) -> None:
    """Its next unit goes into a stream at ``now``: what that means for who comes later."""
    if not flight.decoding:
        flight.ends = note_chunk(flight.grant, flights, now)
    elif not (flight.looping and flight.queued):
        note_pass(flight, flights, now)


def note_pass(flight: Flight, flights: Collection[Flight], now: int) -> None:
    """A pass of a decode begins: from now on the rule is about the next one."""
    flight.start_by = now + flight.grant.interval
    flight.passed = passed_at_begin(flight, flights)


def passed_at_begin(flight: Flight, flights: Collection[Flight]) -> int:
    """Whether a prompt's layer task that runs now makes the token that begins wait."""
    running = (other.ends for other in flights if not other.decoding and other.queued > 0)
    return already_passed(flight, running)


def _lane_for(flight: Flight, lanes: Iterable[Lane]) -> FlightLane | None:
    """The lane that takes the flight's next unit now."""
    if not flight.goes_on:
        return None
    if flight.lane is not None:
        return flight.lane if flight.lane.takes(flight) else None
    free = [lane for lane in lanes if lane.phase is flight.grant.phase and lane.may_bind]
    return min(free, key=lambda lane: len(lane.bound), default=None)
