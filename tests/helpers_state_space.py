"""Explores every order in which the steps of a few threads can happen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

State = TypeVar("State", bound=Hashable)


class Violation(Exception):  # noqa: N818
    """A step saw what it must never see."""


def explore(
    start: State,
    steps: Callable[[State], Iterable[tuple[str, Callable[[], State]]]],
    finished: Callable[[State], bool],
) -> tuple[int, str | None]:
    """Visit every state that can be reached from ``start``.

    ``steps`` names the steps possible in a state, each with a function that makes the next state or raises
    Violation. Returns the number of states, and the first thing wrong with the shortest way to it: a
    violation, or a state without steps that is not ``finished``.
    """
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        stuck = True
        for name, step in steps(state):
            stuck = False
            try:
                after = step()
            except Violation as violation:
                return len(came_from), f"{violation} after {', '.join([*_way(came_from, state), name])}"
            if after not in came_from:
                came_from[after] = (state, name)
                waiting.append(after)
        if stuck and not finished(state):
            return len(came_from), f"stuck after {', '.join(_way(came_from, state))}"
    return len(came_from), None


def _way(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names: list[str] = []
    step = came_from[state]
    while step is not None:
        state, name = step
        names.append(name)
        step = came_from[state]
    return names[::-1]
