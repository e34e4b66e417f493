"""The protocol of kernels/triton/ffn_queue.py, explored in all orders, and what its parts are there for.

What a thread stores plainly is pending until its next release, which waits for it, or arrives before at any
time. Two askers enter halves, each the next when its last is done, two programs serve them launch after
launch, program 0 ends a launch whenever it finds nothing, and the host launches when it is asked to. A launch
begins when both programs have ended the one before, and each of them at a time of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest

from helpers_state_space import Violation, explore

pytestmark = pytest.mark.unit

PROGRAMS, ASKERS, SLOTS = 2, 2, 2
HALVES = (2, 1)
"""How many each asker asks for."""

MOST_LAUNCHES = 3
"""After which program 0 ends none any more: it might do so for ever."""

END = -1
Memory = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class World:
    """``memory``, and each thread's ``pending`` stores: askers', then programs'. ``at`` is where each is.
    ``launches`` are in the stream. ``done`` counts who has served each half (asker, number)."""

    memory: Memory = ()
    pending: tuple[Memory, ...] = ((),) * (ASKERS + PROGRAMS)
    at: tuple[tuple[object, ...], ...] = (("draw", 0),) * ASKERS + (("out", 1),) * PROGRAMS
    launches: int = 0
    done: tuple[tuple[int, int], ...] = ()


Steps = Iterable[tuple[str, Callable[[], World]]]


def put(memory: Memory, place: str, value: int) -> Memory:
    return tuple(sorted({**dict(memory), place: value}.items()))


class Protocol:
    """The steps, and what a mutation leaves out."""

    def __init__(self, mutation: str | None = None) -> None:
        self.mutation = mutation

    # -- memory -----------------------------------------------------------------------------------------

    def read(self, world: World, thread: int, place: str) -> int:
        return dict(world.pending[thread]).get(place, dict(world.memory).get(place, 0))

    def store(self, world: World, thread: int, place: str, value: int) -> World:
        pending = list(world.pending)
        pending[thread] = put(pending[thread], place, value)
        return replace(world, pending=tuple(pending))

    def can_release(self, world: World, thread: int, name: str) -> bool:
        return self.mutation == f"plain {name}" or not world.pending[thread]

    def write(self, world: World, place: str, value: int) -> World:
        return replace(world, memory=put(world.memory, place, value))

    def add(self, world: World, place: str, value: int = 1) -> World:
        return self.write(world, place, dict(world.memory).get(place, 0) + value)

    def go(self, world: World, thread: int, *where: object) -> World:
        at = list(world.at)
        at[thread] = where
        return replace(world, at=tuple(at))

    # -- steps ------------------------------------------------------------------------------------------

    def steps(self, world: World) -> Steps:
        for thread, pending in enumerate(world.pending):
            for place, value in pending:
                yield (
                    f"{thread}'s {place} arrives",
                    lambda t=thread, p=place, v=value: self.arrive(world, t, p, v),
                )
        for asker in range(ASKERS):
            yield from self.asker(world, asker)
        for thread in range(ASKERS, ASKERS + PROGRAMS):
            yield from self.program(world, thread)
        if dict(world.memory).get("asked", 0) > world.launches:
            yield "launch", lambda: replace(world, launches=world.launches + 1)

    def arrive(self, world: World, thread: int, place: str, value: int) -> World:
        pending = list(world.pending)
        pending[thread] = tuple(item for item in pending[thread] if item[0] != place)
        return self.write(replace(world, pending=tuple(pending)), place, value)

    # -- whoever asks -----------------------------------------------------------------------------------

    def asker(self, world: World, me: int) -> Steps:
        step, number, *rest = world.at[me]
        if step == "draw" and number != HALVES[me]:
            yield f"{me} draws", lambda: self.draw(world, me, number)
        elif step == "ask":
            asked = self.read(world, me, "closed") + 1
            yield f"{me} asks", lambda: self.go(self.write(world, "asked", asked), me, "fill", number, *rest)
        elif step == "fill" and self.is_free(world, me, rest[0]):
            yield f"{me} fills {rest[0]}", lambda: self.fill(world, me, number, rest[0])
        elif step == "publish" and self.can_release(world, me, "publish"):
            yield f"{me} publishes {rest[0]}", lambda: self.publish(world, me, number, rest[0])
        elif step == "wait" and self.is_done(world, me, rest[0]):
            yield f"{me} has {rest[0]}", lambda: self.see(world, me, number)

    def draw(self, world: World, me: int, number: object) -> World:
        tickets = dict(world.memory).get("tickets", 0)
        world = self.write(world, "tickets", tickets + 2)
        late = tickets % 2 == 0 and self.mutation != "asks nobody"
        return self.go(world, me, "ask" if late else "fill", number, tickets // 2)

    def is_free(self, world: World, me: int, sequence: object) -> bool:
        assert isinstance(sequence, int)
        if self.mutation == "one counter of all retired":
            return self.read(world, me, "all retired") >= (sequence - SLOTS + 1) * PROGRAMS
        return self.read(world, me, f"retired {sequence % SLOTS}") >= sequence // SLOTS * PROGRAMS

    def fill(self, world: World, me: int, number: object, sequence: object) -> World:
        assert isinstance(sequence, int) and isinstance(number, int)
        world = self.store(world, me, f"entry {sequence % SLOTS}", 10 * (me + 1) + number)
        return self.go(world, me, "publish", number, sequence)

    def publish(self, world: World, me: int, number: object, sequence: int) -> World:
        place = f"sequence {sequence % SLOTS}"
        if self.mutation == "plain publish":
            world = self.store(world, me, place, sequence + 1)
        else:
            world = self.write(world, place, sequence + 1)
        return self.go(world, me, "wait", number, sequence)

    def is_done(self, world: World, me: int, sequence: object) -> bool:
        assert isinstance(sequence, int)
        if self.mutation == "one counter of all retired":
            return self.read(world, me, "all retired") >= (sequence + 1) * PROGRAMS
        retired = self.read(world, me, f"retired {sequence % SLOTS}")
        return retired >= (sequence // SLOTS + 1) * PROGRAMS

    def see(self, world: World, me: int, number: object) -> World:
        assert isinstance(number, int)
        half = 10 * (me + 1) + number
        served = dict(world.done).get(half, 0)
        results = [self.read(world, me, f"result {half} {program}") for program in range(PROGRAMS)]
        if served != PROGRAMS or not all(results):
            raise Violation(f"{half} was served by {served}, and has {results}")
        return self.go(world, me, "draw", number + 1)

    # -- a program --------------------------------------------------------------------------------------

    def program(self, world: World, thread: int) -> Steps:
        step, launch, *rest = world.at[thread]
        me = thread - ASKERS
        assert isinstance(launch, int)
        if step == "out" and world.launches >= launch and self.all_ended(world, launch - 1):
            yield f"program {me} begins {launch}", lambda: self.begin(world, thread, launch)
            return
        if step == "out":
            return
        sequence, met = rest[0], rest[1]
        assert isinstance(sequence, int) and isinstance(met, int)
        slot = sequence % SLOTS
        if step == "look":
            if self.read(world, thread, f"sequence {slot}") > sequence:
                yield (
                    f"program {me} takes {sequence}",
                    lambda: self.take(world, thread, launch, sequence, met),
                )
            elif me == 0 and launch < MOST_LAUNCHES:
                closing = self.prepare(world, thread, launch, sequence, met)
                yield f"{launch} is to end at {sequence}", lambda: closing
        elif step == "close" and self.can_release(world, thread, "end"):
            yield f"tries to end {launch}", lambda: self.close(world, thread, launch, sequence, met)
        elif step == "ended" and self.can_release(world, thread, "publish the end"):
            ended = self.write(world, f"sequence {slot}", sequence + 1)
            yield f"{launch} ends", lambda: self.go(ended, thread, "look", launch, sequence, met)
        elif step in ("share", "sum") and self.can_release(world, thread, f"arrival after {step}"):
            arrived, after = self.add(world, "meetings"), (f"{step} met", launch, sequence, met + 1, rest[2])
            yield f"program {me} at {met + 1}", lambda: self.go(arrived, thread, *after)
        elif step == "share met" and self.all_met(world, met, "share"):
            yield f"program {me} sums", lambda: self.sum_up(world, thread, launch, sequence, met, rest[2])
        elif step == "sum met" and self.all_met(world, met, "sum"):
            yield f"program {me} stores", lambda: self.result(world, thread, launch, sequence, met, rest[2])
        elif step == "retire" and self.can_release(world, thread, "retire"):
            retired = self.retire(world, thread, launch, sequence, met, rest[2])
            yield f"program {me} retires {sequence}", lambda: retired

    def all_ended(self, world: World, launch: int) -> bool:
        return all(self.reached(where) > launch for where in world.at[ASKERS:])

    @staticmethod
    def reached(where: tuple[object, ...]) -> int:
        launch = where[1]
        assert isinstance(launch, int)
        return launch

    def begin(self, world: World, thread: int, launch: int) -> World:
        parity = "" if self.mutation == "one place to begin" else str(launch % 2)
        sequence, met = (self.read(world, thread, f"{what}{parity}") for what in ("begin", "met"))
        if thread == ASKERS:
            world = self.add(world, "tickets")
        return self.go(world, thread, "look", launch, sequence, met)

    def take(self, world: World, thread: int, launch: int, sequence: int, met: int) -> World:
        entry = self.read(world, thread, f"entry {sequence % SLOTS}")
        if self.read(world, thread, f"sequence {sequence % SLOTS}") != sequence + 1:
            raise Violation(f"slot of {sequence} was filled again before all had it")
        if entry == END:
            return self.go(world, thread, "retire", launch, sequence, met, entry)
        world = self.store(world, thread, f"share {thread}", entry)
        return self.go(world, thread, "share", launch, sequence, met, entry)

    def all_met(self, world: World, met: int, step: str) -> bool:
        return self.mutation == f"no meeting after {step}" or dict(world.memory)["meetings"] >= met * PROGRAMS

    def sum_up(self, world: World, thread: int, launch: int, sequence: int, met: int, entry: int) -> World:
        for other in range(ASKERS, ASKERS + PROGRAMS):
            share = self.read(world, thread, f"share {other}")
            if share != entry:
                raise Violation(f"{entry} sees a share of {share}")
        return self.go(world, thread, "sum", launch, sequence, met, entry)

    def result(self, world: World, thread: int, launch: int, sequence: int, met: int, entry: int) -> World:
        world = self.store(world, thread, f"result {entry} {thread - ASKERS}", 1)
        done = dict(world.done)
        done[entry] = done.get(entry, 0) + 1
        if done[entry] > PROGRAMS:
            raise Violation(f"{entry} is served again")
        world = replace(world, done=tuple(sorted(done.items())))
        return self.go(world, thread, "retire", launch, sequence, met, entry)

    def retire(self, world: World, thread: int, launch: int, sequence: int, met: int, entry: int) -> World:
        if self.mutation == "one counter of all retired":
            world = self.add(world, "all retired")
        place = f"retired {sequence % SLOTS}"
        if self.mutation == "plain retire":
            world = replace(world, memory=put(world.memory, place, dict(world.memory).get(place, 0) + 1))
        else:
            world = self.add(world, place)
        if entry == END:
            return self.go(world, thread, "out", launch + 1)
        return self.go(world, thread, "look", launch, sequence + 1, met)

    # -- the end of a launch ----------------------------------------------------------------------------

    def prepare(self, world: World, thread: int, launch: int, sequence: int, met: int) -> World:
        parity = "" if self.mutation == "one place to begin" else str((launch + 1) % 2)
        world = self.store(world, thread, f"begin{parity}", sequence + 1)
        world = self.store(world, thread, f"met{parity}", met)
        if self.mutation != "closed is said later":
            world = self.store(world, thread, "closed", launch)
        return self.go(world, thread, "close", launch, sequence, met)

    def close(self, world: World, thread: int, launch: int, sequence: int, met: int) -> World:
        tickets, opened = dict(world.memory)["tickets"], 2 * sequence + 1
        if tickets != opened and self.mutation != "ends whoever has drawn":
            return self.go(world, thread, "look", launch, sequence, met)
        world = self.write(world, "tickets", opened + 1 if tickets == opened else tickets + 1)
        world = self.store(world, thread, "closed", launch)
        world = self.store(world, thread, f"entry {sequence % SLOTS}", END)
        return self.go(world, thread, "ended", launch, sequence, met)

    def finished(self, world: World) -> bool:
        """All is done, and nobody has asked for a launch that was not made."""
        return all(where[:2] == ("draw", HALVES[me]) for me, where in enumerate(world.at[:ASKERS]))


def test_every_order_of_the_protocol_is_right() -> None:
    protocol = Protocol()
    states, wrong = explore(World(), protocol.steps, protocol.finished)
    assert wrong is None
    assert states > 1000


@pytest.mark.parametrize(
    "mutation",
    [
        "plain publish",
        "plain arrival after share",
        "plain retire",
        "plain end",
        "plain publish the end",
        "one counter of all retired",
        "no meeting after share",
        "no meeting after sum",
        "asks nobody",
        "closed is said later",
        "one place to begin",
        "ends whoever has drawn",
    ],
)
def test_no_part_of_the_protocol_can_be_left_out(mutation: str) -> None:
    protocol = Protocol(mutation)
    _, wrong = explore(World(), protocol.steps, protocol.finished)
    assert wrong is not None
