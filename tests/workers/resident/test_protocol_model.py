"""The protocol of workers/resident/control.py, explored in all orders, and what its parts are there for.

Threads write to memory through a set of pending writes, any of which may reach memory at any time: a release
waits until none is pending, a plain write joins them. So whatever a missing release would allow on any CPU
happens here. Reads are of memory, newest own pending write first.

Two teams run the stages of micro-batches, some of them together, each its part (an FFN that devices share, or
a context whose blocks they share), and the engine's thread submits more micro-batches than there are slots.
Every stage checks that body and hidden states are of its micro-batch and of all parts of the stage before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest

from helpers_state_space import Violation, explore

pytestmark = pytest.mark.unit

HOME, AWAY, BOTH = (0,), (1,), (0, 1)
SLOTS = 2
OWNERS = {
    1: (HOME, BOTH, HOME, AWAY),
    2: (AWAY, HOME),
    3: (HOME,),
    4: (AWAY, BOTH, BOTH),
}
"""The teams of each stage of each micro-batch: a later one may end before an earlier one, and a slot's next
micro-batch has other teams than its last."""

BATCHES = len(OWNERS)

Memory = tuple[tuple[str, object], ...]
ENGINE, TEAM0, TEAM1 = range(3)


@dataclass(frozen=True)
class World:
    """``memory`` and each thread's ``pending`` writes, sorted by place; ``at`` is where each thread is in
    its steps; ``slot_of`` the slots by sequence; ``events`` the sequences whose end was announced; ``ran``
    what each team has run last in each slot."""

    memory: Memory = ()
    pending: tuple[Memory, Memory, Memory] = ((), (), ())
    at: tuple[object, ...] = ("submit", "look", "look")
    submitted: int = 0
    slot_of: tuple[int, ...] = ()
    events: frozenset[int] = frozenset()
    ran: tuple[frozenset[tuple[int, int, int]], ...] = (frozenset(), frozenset())


def put(memory: Memory, place: str, value: object) -> Memory:
    return tuple(sorted({**dict(memory), place: value}.items()))


class Protocol:
    """The steps, and what a mutation leaves out."""

    def __init__(self, mutation: str | None = None) -> None:
        self.mutation = mutation

    # -- memory -----------------------------------------------------------------------------------------

    def read(self, world: World, thread: int, place: str, default: object) -> object:
        return dict(world.pending[thread]).get(place, dict(world.memory).get(place, default))

    def write(self, world: World, thread: int, place: str, value: object) -> World:
        pending = list(world.pending)
        pending[thread] = put(pending[thread], place, value)
        return replace(world, pending=tuple(pending))

    def released(self, world: World, thread: int, name: str) -> bool:
        """Whether this release can happen now: a mutated one never waits."""
        return self.mutation == f"plain {name}" or not world.pending[thread]

    def release(self, world: World, thread: int, name: str, place: str, value: object) -> World:
        if self.mutation == f"plain {name}":
            return self.write(world, thread, place, value)
        return replace(world, memory=put(world.memory, place, value))

    def go(self, world: World, thread: int, where: object) -> World:
        at = list(world.at)
        at[thread] = where
        return replace(world, at=tuple(at))

    # -- steps ------------------------------------------------------------------------------------------

    def steps(self, world: World) -> Iterable[tuple[str, Callable[[], World]]]:
        for thread, pending in enumerate(world.pending):
            for place, value in pending:
                yield (
                    f"thread {thread}'s {place} arrives",
                    lambda t=thread, p=place, v=value: self.arrive(world, t, p, v),
                )
        yield from self.engine_steps(world)
        for team in (TEAM0, TEAM1):
            yield from self.team_steps(world, team)

    def arrive(self, world: World, thread: int, place: str, value: object) -> World:
        pending = list(world.pending)
        pending[thread] = tuple(item for item in pending[thread] if item[0] != place)
        return replace(world, pending=tuple(pending), memory=put(world.memory, place, value))

    def engine_steps(self, world: World) -> Iterable[tuple[str, Callable[[], World]]]:
        where = world.at[ENGINE]
        if where == "submit" and world.submitted < BATCHES:
            sequence = world.submitted + 1
            for slot in range(SLOTS):
                if self.is_free(world, slot, sequence):
                    yield f"fill slot {slot} for {sequence}", lambda s=slot: self.fill(world, s, sequence)
        elif isinstance(where, tuple) and self.released(world, ENGINE, "submit"):
            _, slot, sequence = where
            yield (
                f"submit {sequence}",
                lambda: self.go(
                    self.release(world, ENGINE, "submit", f"position {slot}", (sequence, 0)), ENGINE, "submit"
                ),
            )

    def is_free(self, world: World, slot: int, sequence: int) -> bool:
        last = max((i + 1 for i, own in enumerate(world.slot_of) if own == slot), default=0)
        if self.mutation == "reuse at the event":
            return last == 0 or last in world.events
        if self.mutation == "one counter of all retired":
            return slot == sequence % SLOTS and sequence - len(world.events) <= SLOTS
        return self.read(world, ENGINE, f"retired {slot}", 0) == last

    def fill(self, world: World, slot: int, sequence: int) -> World:
        world = self.write(world, ENGINE, f"body {slot}", sequence)
        world = replace(world, submitted=sequence, slot_of=(*world.slot_of, slot))
        return self.go(world, ENGINE, ("filled", slot, sequence))

    def team_steps(self, world: World, team: int) -> Iterable[tuple[str, Callable[[], World]]]:
        where, number = world.at[team], team - TEAM0
        if where == "look":
            for slot in range(SLOTS):
                sequence, stage = self.position(world, team, slot)
                if sequence and (slot, sequence, stage) not in world.ran[number]:
                    seen = ("seen", slot, sequence, stage)
                    yield f"team {number} sees {sequence}.{stage}", lambda w=seen: self.go(world, team, w)
            return
        assert isinstance(where, tuple)
        step, slot, sequence, stage = where
        if step == "seen":
            yield f"team {number} reads of {sequence}.{stage}", lambda: self.begin(world, team, *where[1:])
        elif step == "ran" and (len(OWNERS[sequence][stage]) == 1 or self.released(world, team, "count")):
            yield f"team {number} counts {sequence}.{stage}", lambda: self.count(world, team, *where[1:])
        elif step == "last" and self.released(world, team, "hand-over"):
            yield (
                f"hand over {sequence}.{stage + 1}",
                lambda: self.go(
                    self.release(world, team, "hand-over", f"position {slot}", (sequence, stage + 1)),
                    team,
                    "look",
                ),
            )
        elif step == "ended":
            told = replace(world, events=world.events | {sequence})
            yield f"announce {sequence}", lambda: self.go(told, team, ("told", slot, sequence, stage))
        elif step == "told" and self.released(world, team, "retire"):
            yield f"retire {sequence}", lambda: self.retire(world, team, slot)

    def position(self, world: World, thread: int, slot: int) -> tuple[int, int]:
        """Of the micro-batch in a slot, (0, 0) if there is none."""
        position = self.read(world, thread, f"position {slot}", (0, 0))
        retired = self.read(world, thread, f"retired {slot}", 0)
        assert isinstance(position, tuple) and isinstance(retired, int)
        return position if position[0] > retired else (0, 0)

    def begin(self, world: World, team: int, slot: int, sequence: int, stage: int) -> World:
        """The team reads who runs the stage of the micro-batch that the slot holds now, which may be the next
        one already; then it looks again whether it is still where it was."""
        number = team - TEAM0
        held = self.read(world, team, f"body {slot}", 0)
        assert isinstance(held, int)
        stages = OWNERS.get(held, OWNERS[sequence])
        owners = stages[stage] if stage < len(stages) else ()
        here = self.position(world, team, slot) == (sequence, stage) or self.mutation == "no second look"
        if number not in owners or not here:
            return self.go(world, team, "look")
        return self.run(world, team, slot, sequence, stage)

    def run(self, world: World, team: int, slot: int, sequence: int, stage: int) -> World:
        number = team - TEAM0
        body = self.read(world, team, f"body {slot}", 0)
        if body != sequence:
            raise Violation(f"{sequence}.{stage} sees the body of {body}")
        for part in range(len(OWNERS[sequence][stage - 1])) if stage else ():
            before = self.read(world, team, f"hidden {slot} {(stage - 1) % 2} {part}", None)
            if before != (sequence, stage - 1):
                raise Violation(f"{sequence}.{stage} sees hidden states of {before}")
        part = OWNERS[sequence][stage].index(number)
        world = self.write(world, team, f"hidden {slot} {stage % 2} {part}", (sequence, stage))
        if self.mutation != "a part twice":
            ran = list(world.ran)
            ran[number] = frozenset(place for place in ran[number] if place[0] != slot)
            ran[number] |= {(slot, sequence, stage)}
            world = replace(world, ran=tuple(ran))
        return self.go(world, team, ("ran", slot, sequence, stage))

    def count(self, world: World, team: int, slot: int, sequence: int, stage: int) -> World:
        """Where a stage has several parts, an atomic addition, which releases too, says who is the last of
        them."""
        parts, place = len(OWNERS[sequence][stage]), f"done {slot}"
        if parts > 1 and self.mutation != "each part hands over":
            done = dict(world.memory).get(place, 0)
            assert isinstance(done, int)
            last = done + 1 >= parts
            left = done + 1 if not last or self.mutation == "a counter that is kept" else 0
            world = replace(world, memory=put(world.memory, place, left))
            if not last:
                return self.go(world, team, "look")
        ended = stage + 1 == len(OWNERS[sequence])
        return self.go(world, team, ("ended" if ended else "last", slot, sequence, stage))

    def retire(self, world: World, team: int, slot: int) -> World:
        """As the compiled code: the sequence is read from the slot."""
        position = self.read(world, team, f"position {slot}", (0, 0))
        assert isinstance(position, tuple)
        world = self.release(world, team, "retire", f"retired {slot}", position[0])
        return self.go(world, team, "look")

    def finished(self, world: World) -> bool:
        return world.events == frozenset(range(1, BATCHES + 1))


def test_every_order_of_the_protocol_is_right() -> None:
    protocol = Protocol()
    states, wrong = explore(World(), protocol.steps, protocol.finished)
    assert wrong is None
    assert states > 1000


@pytest.mark.parametrize(
    "mutation",
    [
        "plain submit",
        "plain hand-over",
        "plain retire",
        "plain count",
        "one counter of all retired",
        "reuse at the event",
        "no second look",
        "a part twice",
        "each part hands over",
        "a counter that is kept",
    ],
)
def test_no_part_of_the_protocol_can_be_left_out(mutation: str) -> None:
    protocol = Protocol(mutation)
    _, wrong = explore(World(), protocol.steps, protocol.finished)
    assert wrong is not None
