from __future__ import annotations

import pytest

from crosspool.core.ids import Nanoseconds
from crosspool.workers.resident.watch import LOOK_EVERY, Watch

pytestmark = pytest.mark.unit

HALF = LOOK_EVERY // 2


def silences(*looks: tuple[int, tuple[int, ...]]) -> list[int]:
    watch = Watch()
    return [watch.silence(beats, Nanoseconds(now)) for now, beats in looks]


def test_a_team_that_beats_is_not_silent() -> None:
    assert silences((0, (5, 9)), (HALF, (6, 10)), (3 * HALF, (7, 11))) == [0, 0, 0]


def test_the_longest_silence_counts_until_that_team_beats() -> None:
    looks = ((0, (5, 9)), (HALF, (5, 10)), (2 * HALF, (5, 10)), (3 * HALF, (6, 10)), (4 * HALF, (7, 11)))
    assert silences(*looks) == [0, HALF, 2 * HALF, 2 * HALF, 0]


def test_a_process_that_stood_still_does_not_blame_its_teams() -> None:
    assert silences((0, (5,)), (100 * LOOK_EVERY, (5,)), (101 * LOOK_EVERY, (6,))) == [0, LOOK_EVERY, 0]
