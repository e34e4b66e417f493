"""Rows and flags between two teams' memory: alone, and in two processes at the same time."""

from __future__ import annotations

import re

import pytest
import torch
import torch.multiprocessing as multiprocessing

from crosspool.kernels.triton.crossing import RAISED, SENT, TAKEN, Flag, receive, send, settle
from crosspool.kernels.triton.words import FAILED, LANE_WORDS, QUERIES, ROWS
from helpers_crossing import MOST_QUERIES, Team, answer, ask
from helpers_triton import DEVICE
from helpers_triton_gates import (
    SM_90,
    Target,
    assert_builds_well,
    instructions,
    needs_interpreter,
    on_targets,
)

pytestmark = pytest.mark.backend


def two_teams(queries: int = 3) -> tuple[Team, Team]:
    home, remote = Team(0, DEVICE), Team(1, DEVICE)
    home.words[ROWS], home.words[QUERIES] = queries - 1, queries
    home.states.copy_(torch.rand(home.states.shape))
    home.extra.random_(100)
    return home, remote


def counts(home: Team, remote: Team) -> tuple[int, int, int]:
    """Sent by the home, and at the remote raised and taken."""
    flags = remote.flags[0].tolist()
    return int(home.flags[1, SENT]), flags[RAISED], flags[TAKEN]


@pytest.mark.parametrize("queries", [0, 1, 3, MOST_QUERIES])
def test_rows_of_queries_cross_and_no_others(queries: int) -> None:
    home, remote = two_teams(queries)
    home.send(remote, tells=True)
    for target, source in home.carried_to(remote):
        assert target[:queries].equal(source[:queries])
        assert target[queries:].eq(-1).all()
    assert remote.words[[ROWS, QUERIES]].tolist() == [queries - 1, queries]
    assert counts(home, remote) == (1, 1, 0)
    assert home.zeros.item() == 0, "arrivals are as they were"


def test_a_pass_whose_size_is_known_is_not_told_again() -> None:
    home, remote = two_teams()
    home.send(remote, tells=False)
    assert not remote.words.any() and counts(home, remote) == (1, 1, 0)


def test_flags_only_grow_and_each_is_taken_once() -> None:
    home, remote = two_teams()
    for lap in range(1, 5):
        home.send(remote, tells=True)
        assert counts(home, remote) == (lap, lap, lap - 1)
        remote.receive(home, most_looks=0)
        assert counts(home, remote) == (lap, lap, lap) and not remote.failed
    assert remote.flags[1].sum() == 0 and home.flags[0].sum() == 0


def test_who_waits_in_vain_has_failed_and_neither_waits_nor_sends_any_more() -> None:
    home, remote = two_teams()
    remote.receive(home, most_looks=3)
    assert remote.failed and counts(home, remote) == (0, 0, 0)
    home.send(remote, tells=True)
    remote.receive(home)
    assert counts(home, remote) == (1, 1, 0)
    remote.words[QUERIES] = 2
    before = home.states.clone()
    remote.send(home, tells=False)
    assert home.states.equal(before) and not home.flags[1, RAISED] and not remote.flags[0, SENT]


def test_what_has_settled_waits_for_what_comes_next() -> None:
    home, remote = two_teams()
    home.send(remote, tells=True)
    home.send(remote, tells=True)
    remote.words[FAILED] = 1
    settle(remote.words, remote.flags, failed=False)
    assert not remote.failed and counts(home, remote) == (2, 2, 2)
    remote.receive(home, most_looks=3)
    assert remote.failed, "nothing had come"
    settle(remote.words, remote.flags, failed=False)
    home.send(remote, tells=True)
    remote.receive(home, most_looks=0)
    assert not remote.failed and counts(home, remote) == (3, 3, 3)
    settle(remote.words, remote.flags, failed=True)
    assert remote.failed


@needs_interpreter
def test_two_processes_answer_each_other() -> None:
    laps = 60
    home, remote = Team(0, DEVICE), Team(1, DEVICE)
    for team in (home, remote):
        team.share()
    other = multiprocessing.get_context("spawn").Process(target=answer, args=(remote, home, laps))
    other.start()
    try:
        ask(home, remote, laps, seed=0)
    finally:
        other.join(30)
        other.kill()
    assert other.exitcode == 0 and counts(home, remote) == (laps, laps, laps)


@needs_interpreter
def test_a_flag_is_released_and_acquired_for_the_whole_system() -> None:
    """Nothing that is interpreted would miss it."""
    sent = instructions(lambda: send(LANE, [(REAL[0], REAL[1])], LANE, FLAG), SM_90)
    arrivals, exchange = (re.search(what, sent) for what in (r"\.gpu\.acq_rel\.add", r"\.sys\.release\.exch"))
    assert arrivals is not None and exchange is not None and arrivals.end() < exchange.start()
    taken = instructions(lambda: receive(LANE, FLAG), SM_90)
    assert len(re.findall(r"ld\.global\.sys\.acquire|atom\.global\.sys\.acquire", taken)) == 2


REAL = [torch.empty(32, 2048, dtype=torch.bfloat16) for _ in range(2)]
LANE, WORD = torch.empty(LANE_WORDS, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
FLAG = Flag(WORD, WORD, WORD, torch.empty(1, dtype=torch.int32))


@needs_interpreter
@on_targets({"rows": lambda: send(LANE, [(REAL[0], REAL[1])], LANE, FLAG)})
def test_gates(launch: object, target: Target) -> None:
    assert_builds_well(launch, target)


@needs_interpreter
@on_targets(
    {
        "a flag": lambda: receive(LANE, FLAG),
        "flags": lambda: settle(LANE, torch.empty(3, 48, dtype=torch.int64), failed=False),
    }
)
def test_gates_of_flags(launch: object, target: Target) -> None:
    assert_builds_well(launch, target, wide_loads=False)
