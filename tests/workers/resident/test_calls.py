"""Calling some of a team's threads to a task: who is called takes part, who is not is not missed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.intrinsics import words
from crosspool.kernels.numba.team import SHARED_WORDS, THREADS, claim, meet, new_own, share
from crosspool.workers.resident.calls import NOT_CALLED, await_call, call
from crosspool.workers.resident.control import NO_SLOT, TASK_PART, TASK_SLOT, TASK_STAGE, TEAM_WORDS
from helpers_state_space import Violation, explore

ROUNDS = 3000
PATIENCE = 1_000_000
"""ns"""


@kernel
def work(shared, own, done, took, number):
    """Task ``number``: every unit adds 1, and every thread says that it took part."""
    took[number] = own[THREADS]
    for _ in range(2):
        share(own, number % 5)
        unit = claim(shared, own)
        while unit >= 0:
            done[number, unit] += 1
            unit = claim(shared, own)
        meet(shared, own)


@kernel
def lead(team, shared, own_address, called, done, took):
    own = words(own_address, THREADS + 1)
    for number in range(len(called)):
        own[THREADS] = called[number]
        call(team, own_address, 0, number, 0)
        work(shared, words(own_address, 8), done, took, number)
    own[THREADS] = called[0]
    call(team, own_address, NO_SLOT, 0, 0)


@kernel
def follow(team, shared, own_address, done, took):
    taken = 0
    while True:
        number = await_call(team, own_address, taken, PATIENCE)
        if number == NOT_CALLED:
            continue
        taken = number
        task = words(team, TASK_PART + 1)
        if task[TASK_SLOT] == NO_SLOT:
            return
        work(shared, words(own_address, 8), done, took, task[TASK_STAGE])


@pytest.mark.backend
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_units_are_done_once_by_whoever_is_called(threads: int) -> None:
    rng = random.Random(threads)
    called = np.array([threads, *(rng.randint(1, threads) for _ in range(ROUNDS - 1))])
    team, shared = np.zeros(TEAM_WORDS, np.int64), np.zeros(SHARED_WORDS, np.int64)
    own = [new_own(index, threads) for index in range(threads)]
    done = np.zeros((ROUNDS, 5), np.int64)
    took = np.zeros((threads, ROUNDS), np.int64)
    where = (team.ctypes.data, shared.ctypes.data)
    members = [
        threading.Thread(target=follow, args=(*where, own[i].ctypes.data, done, took[i]))
        for i in range(1, threads)
    ]
    for member in members:
        member.start()
    lead(*where, own[0].ctypes.data, called, done, took[0])
    for member in members:
        member.join()
    for number in range(ROUNDS):
        units = number % 5
        assert done[number].tolist() == [2] * units + [0] * (5 - units)
        assert took[:, number].tolist() == [called[number]] * called[number] + [0] * (
            threads - called[number]
        )


# -- all orders ----------------------------------------------------------------------------------------------

CALLED = (3, 2, 1, 2, 3, 1, 3)
"""How many threads each task of the model calls, the leader included."""


@dataclass(frozen=True)
class World:
    """``at`` is where leader and members are in their steps; ``known`` what each member has read; ``left``
    how many that are called have still to take the present task."""

    task: tuple[int, int] = (0, 0)
    pending: tuple[int, int] | None = None
    returns: int = 0
    asleep: int = 0
    at: tuple[str, str, str] = ("call", "look", "look")
    known: tuple[tuple[int, tuple[int, int]], ...] = ((0, (0, 0)),) * 2
    taken: tuple[int, int] = (0, 0)
    left: int = 0
    given: int = 0
    before: int = 0


Step = tuple[str, Callable[[], World]]


class Calls:
    """The steps of calls.py with sleeps that nothing but a wake ends, and what a mutation leaves out."""

    def __init__(self, mutation: str | None = None) -> None:
        self.mutation = mutation

    def steps(self, world: World) -> Iterable[Step]:
        yield from self.leader(world)
        for member in (1, 2):
            yield from self.member(world, member)

    def go(self, world: World, thread: int, at: str, **changes: object) -> World:
        places = list(world.at)
        places[thread] = at
        return replace(world, at=tuple(places), **changes)

    # -- leader -----------------------------------------------------------------------------------------

    def leader(self, world: World) -> Iterable[Step]:
        at = world.at[0]
        if world.pending is not None:
            yield "TASK reaches memory", lambda: replace(world, task=world.pending, pending=None)
        if at == "call" and world.left == 0 and world.given < len(CALLED):
            called = CALLED[world.given]
            given = world.given + 1
            task = (called, world.task[1] + 1)
            changes = {"left": called - 1, "given": given, "before": world.task[0]}
            if self.mutation == "no fence":
                yield "call", lambda: self.go(world, 0, "wake", pending=task, **changes)
            else:
                yield "call", lambda: self.go(world, 0, "wake", task=task, **changes)
        elif at == "wake":
            yield (
                "wake",
                lambda: (
                    self.wake(world, "sleeps on TASK", "ring") if world.asleep else self.go(world, 0, "ring")
                ),
            )
        elif at == "ring":
            called = (world.pending or world.task)[0]
            if called <= world.before or self.mutation == "returns are not rung":
                yield "no return", lambda: self.go(world, 0, "call")
            else:
                yield (
                    "ring",
                    lambda: replace(self.wake(world, "sleeps on RETURNS", "call"), returns=world.returns + 1),
                )

    def wake(self, world: World, sleeping: str, then: str) -> World:
        woken = {"sleeps on TASK": "awake", "sleeps on RETURNS": "look"}[sleeping]
        members = [woken if at == sleeping else at for at in world.at[1:]]
        return replace(world, at=(then, *members))

    # -- members ----------------------------------------------------------------------------------------

    def know(self, world: World, member: int, returns: int, task: tuple[int, int]) -> dict[str, object]:
        known = list(world.known)
        known[member - 1] = (returns, task)
        return {"known": tuple(known)}

    def member(self, world: World, member: int) -> Iterable[Step]:
        at, (returns, task) = world.at[member], world.known[member - 1]
        name = f"member {member}"
        late = self.mutation == "returns read last"
        if at == "look":
            fresh = self.know(world, member, returns if late else world.returns, world.task if late else task)
            yield f"{name} reads", lambda: self.go(world, member, "decide", **fresh)
        elif at == "decide":
            fresh = (world.returns, task) if late else (returns, world.task)
            changes = self.know(world, member, *fresh)
            if fresh[1][1] == world.taken[member - 1]:
                yield f"{name} waits", lambda: self.go(world, member, "count", **changes)
            elif fresh[1][0] > member:
                yield f"{name} takes", lambda: self.take(world, member, fresh[1])
            else:
                yield f"{name} is not called", lambda: self.go(world, member, "stay away", **changes)
        elif at == "count":
            yield f"{name} counts itself", lambda: self.go(world, member, "sleep", asleep=world.asleep + 1)
        elif at == "sleep":
            sleeps = world.task == task or self.mutation == "sleep without a look"
            yield (
                f"{name} sleeps",
                lambda: self.go(world, member, "sleeps on TASK" if sleeps else "awake"),
            )
        elif at == "awake":
            yield f"{name} wakes", lambda: self.go(world, member, "look", asleep=world.asleep - 1)
        elif at == "stay away":
            yield (
                f"{name} stays away",
                lambda: self.go(world, member, "sleeps on RETURNS" if world.returns == returns else "look"),
            )

    def take(self, world: World, member: int, task: tuple[int, int]) -> World:
        if task != (world.pending or world.task):
            raise Violation(f"member {member} takes task {task[1]} when {world.task[1]} is given")
        taken = list(world.taken)
        taken[member - 1] = task[1]
        return self.go(world, member, "look", taken=tuple(taken), left=world.left - 1)


def finished(world: World) -> bool:
    return world.given == len(CALLED) and world.left == 0


@pytest.mark.unit
def test_no_order_of_steps_loses_a_call() -> None:
    calls = Calls()
    states, wrong = explore(World(), calls.steps, finished)
    assert wrong is None
    assert states > 1000


@pytest.mark.unit
@pytest.mark.parametrize(
    "mutation", ["no fence", "returns are not rung", "returns read last", "sleep without a look"]
)
def test_what_each_step_is_there_for(mutation: str) -> None:
    _, wrong = explore(World(), Calls(mutation).steps, finished)
    assert wrong is not None and wrong.startswith("stuck")
