"""The protocol of workers/resident/control.py, explored in all orders, and what its parts are there for.

Threads write to memory through a set of pending writes, any of which may reach memory at any time: a release
waits until none is pending, a plain write joins them. So whatever a missing release would allow on any CPU
happens here. Reads are of memory, newest own pending write first.

Two teams take turns at the stages of micro-batches (team 0 the even ones, team 1 the odd ones) and the
engine's thread submits more of them than there are slots. Every stage checks that body and hidden states are
of its micro-batch and of the stage before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest

from helpers_state_space import Violation, explore

pytestmark = pytest.mark.unit

SLOTS, BATCHES = 2, 4
STAGES = {1: 3, 2: 2, 3: 1, 4: 2}
"""Stages of each micro-batch: a later one may end before an earlier one."""

Memory = tuple[tuple[str, object], ...]
ENGINE, TEAM0, TEAM1 = range(3)


@dataclass(frozen=True)
class World:
    """``memory`` and each thread's ``pending`` writes, sorted by place; ``at`` is where each thread is in
    its steps; ``slot_of`` the slots by sequence; ``events`` the sequences whose end was announced."""

    memory: Memory = ()
    pending: tuple[Memory, Memory, Memory] = ((), (), ())
    at: tuple[object, ...] = ("submit", "look", "look")
    submitted: int = 0
    slot_of: tuple[int, ...] = ()
    events: frozenset[int] = frozenset()


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
        where = world.at[team]
        if where == "look":
            for slot in range(SLOTS):
                position = self.read(world, team, f"position {slot}", (0, 0))
                retired = self.read(world, team, f"retired {slot}", 0)
                assert isinstance(position, tuple) and isinstance(retired, int)
                sequence, stage = position
                if sequence > retired and stage % 2 == team - TEAM0:
                    yield f"run {sequence}.{stage}", lambda s=slot, p=position: self.run(world, team, s, *p)
            return
        assert isinstance(where, tuple)
        step, slot, sequence, stage = where
        if step == "ran" and self.released(world, team, "hand-over"):
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

    def run(self, world: World, team: int, slot: int, sequence: int, stage: int) -> World:
        body = self.read(world, team, f"body {slot}", 0)
        if body != sequence:
            raise Violation(f"{sequence}.{stage} sees the body of {body}")
        before = self.read(world, team, f"hidden {slot}", None)
        if stage > 0 and before != (sequence, stage - 1):
            raise Violation(f"{sequence}.{stage} sees hidden states of {before}")
        world = self.write(world, team, f"hidden {slot}", (sequence, stage))
        last = stage + 1 == STAGES[sequence]
        return self.go(world, team, ("ended" if last else "ran", slot, sequence, stage))

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
    ["plain submit", "plain hand-over", "plain retire", "one counter of all retired", "reuse at the event"],
)
def test_no_part_of_the_protocol_can_be_left_out(mutation: str) -> None:
    protocol = Protocol(mutation)
    _, wrong = explore(World(), protocol.steps, protocol.finished)
    assert wrong is not None
