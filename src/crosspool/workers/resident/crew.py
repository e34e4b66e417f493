"""The words from which a team's threads find everything: queue, models, scratch, the compiled stages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crosspool.core.topology import Sharding
from crosspool.kernels.numba.team import SHARED_WORDS, new_own
from crosspool.workers.resident.attendance import new_attendance
from crosspool.workers.resident.control import EVENT_WORDS, RING_EVENTS, TEAM_WORDS, Control, new_bytes

CONTROL, SLOT_TABLE, TEAM_TABLE, NUMBER, RING, SHARED, ROOM, MODELS, STAGES = range(9)
WEIGHTS_TEAMS, WEIGHTS, SHARDED, AT_HOME, ATTENDANCE = range(9, 14)
CREW_WORDS = 16
"""Addresses, but for the team's NUMBER, the number of WEIGHTS devices, whether every FFN is SHARDED over
them or is AT_HOME, where its micro-batch's attention runs. STAGES is the address of the stages' addresses,
GQA_STAGE first; MODELS that of the models' addresses by index; ATTENDANCE that of the words of
attendance.py."""

GQA_STAGE, MLA_STAGE, FFN_STAGE, HEAD_STAGE, GQA_SPREAD_STAGE, MLA_SPREAD_STAGE = range(6)


class Crew:
    """One team's words and memory: shared by its threads, and each thread's own.

    ``own[i]`` and ``mine[i]`` are thread i's words (kernels/numba/team.py) and scratch.
    """

    def __init__(
        self,
        control: Control,
        number: int,
        threads: int,
        *,
        stages: np.ndarray,
        models: np.ndarray,
        weights_teams: np.ndarray,
        sharding: Sharding,
        scratch: tuple[int, int],
    ) -> None:
        room, mine = scratch
        self.threads = threads
        self.own = [new_own(index, threads) for index in range(threads)]
        self.mine = [new_bytes(mine) for _ in range(threads)]
        self.attendance = new_attendance(threads)
        self._keep: Sequence[np.ndarray] = (stages, models, weights_teams)
        self._shared = new_bytes(8 * SHARED_WORDS)
        self._room = new_bytes(room)
        self._words = np.zeros(CREW_WORDS, np.int64)
        words = self._words
        words[CONTROL], words[SLOT_TABLE], words[TEAM_TABLE] = control.address, control.slots, control.teams
        words[NUMBER], words[ATTENDANCE] = number, self.attendance.ctypes.data
        words[RING] = control.rings + 8 * RING_EVENTS * EVENT_WORDS * number
        words[SHARED], words[ROOM] = self._shared.ctypes.data, self._room.ctypes.data
        words[STAGES], words[MODELS] = stages.ctypes.data, models.ctypes.data
        words[WEIGHTS_TEAMS], words[WEIGHTS] = weights_teams.ctypes.data, len(weights_teams)
        words[SHARDED], words[AT_HOME] = sharding is Sharding.TENSOR, sharding is Sharding.MODEL

    @property
    def address(self) -> int:
        return int(self._words.ctypes.data)


def team_address(control: Control, number: int) -> int:
    return control.teams + 8 * TEAM_WORDS * number
