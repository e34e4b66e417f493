"""Idle time of cores, as the system tells it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crosspool.backends.core_time import CoreWatch

pytestmark = pytest.mark.unit

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """Two cores, of which number 3 is idle for some share of the time."""

    def __init__(self, folder: Path) -> None:
        self.file, self.time, self.idle = folder / "stat", 100.0, 5000
        self.pass_time(0, 0)

    def pass_time(self, seconds: float, idle: float) -> None:
        self.time += seconds
        self.idle += round(seconds * idle * TICKS)
        self.file.write_text(f"cpu  9 9 9 9 9\ncpu3 7 8 9 {self.idle} 6 5\ncpu30 1 1 1 1 1\nintr 5\n")

    def watch(self) -> CoreWatch:
        return CoreWatch(self.file, lambda: self.time)


def test_a_core_is_free_if_most_of_the_time_since_the_last_look_was_idle(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    watch, answers = machine.watch(), []
    for idle in (1, 1, 0.9, 0.5, 0, 1):
        machine.pass_time(0.2, idle)
        answers.append(watch.is_free(3))
    assert answers == [False, True, True, False, False, True]


def test_two_looks_close_together_say_nothing_and_lose_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    watch = machine.watch()
    watch.is_free(3)
    answers = []
    for _ in range(6):
        machine.pass_time(0.025, 1)
        answers.append(watch.is_free(3))
    assert answers == [False, False, False, True, False, False]


def test_another_core_is_asked_about_anew(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    watch = machine.watch()
    watch.is_free(30)
    machine.pass_time(1, 1)
    assert not watch.is_free(3)
    machine.pass_time(1, 1)
    assert watch.is_free(3)


def test_a_system_that_does_not_tell_has_no_free_core(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for watch in (CoreWatch(tmp_path / "none", lambda: machine.time), machine.watch()):
        for _ in range(3):
            machine.pass_time(1, 1)
            assert not watch.is_free(4)


def test_this_machine_tells() -> None:
    core = min(os.sched_getaffinity(0))
    times = iter([0.0, 1e-3, 1e9])
    watch = CoreWatch(clock=lambda: next(times))
    assert [watch.is_free(core) for _ in range(3)] == [False] * 3
