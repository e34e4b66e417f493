"""Keeps the grants that a scheduler makes."""

from __future__ import annotations

from crosspool.core.batch import Grant, Phase
from helpers_control_plane import World


class Recorder:
    """Every grant that the scheduler makes, in order."""

    def __init__(self, world: World) -> None:
        self.grants: list[Grant] = []
        submit = world.executor.submit

        def record(grant: Grant) -> None:
            self.grants.append(grant)
            submit(grant)

        world.executor.submit = record  # type: ignore[method-assign]

    def of(self, phase: Phase) -> list[Grant]:
        return [grant for grant in self.grants if grant.phase is phase]
