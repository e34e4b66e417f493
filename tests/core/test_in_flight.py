"""The walk of a micro-batch through its layers."""

from __future__ import annotations

import pytest

from crosspool.core.batch import Grant, Half, Phase, Piece, Row, TokenChoice
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.core.in_flight import InFlight
from crosspool.core.sampling import SamplingParams
from crosspool.core.topology import Sharding, Team, Topology

pytestmark = pytest.mark.unit

ONE = Topology(("cpu:0",), ("cpu:0",))
TWO = Topology(("cpu:0",), ("cpu:1",))
ZERO = Nanoseconds(0)


def grant(
    identity: int,
    phase: Phase,
    *,
    steps: int = 1,
    chooses: bool = True,
    start_by: int = 0,
    elsewhere: tuple[int, ...] = (),
) -> Grant:
    choice = TokenChoice(SamplingParams(), 0, 0, 99, frozenset()) if chooses else None
    row = Row(RequestId(identity), 0, (1,), ((),), choice, steps if chooses else 0)
    return Grant(
        GrantId(identity),
        ModelIndex(0),
        phase,
        KvDevice(0),
        (row,),
        steps,
        Nanoseconds(start_by),
        Nanoseconds(5),
        Nanoseconds(10),
        tuple(KvDevice(device) for device in elsewhere),
    )


def walk(in_flight: InFlight, teams: int, *, limit: int = 100) -> list[tuple[int, int, int, Half]]:
    """Run every team in turn until nothing is left; returns (grant, step, layer, half) in order."""
    seen = []
    for _ in range(limit):
        tasks = [in_flight.start(Team(team), ZERO) for team in range(teams)]
        for task in tasks:
            if task is not None:
                seen.append((task.grant, task.step, task.layer, task.half))
                in_flight.finish(task, ZERO)
        if not any(tasks):
            return seen
    raise AssertionError("it never ends")


def test_a_decode_walks_all_halves_and_the_head_for_each_step() -> None:
    in_flight = InFlight(ONE, lambda _: 2)
    in_flight.submit(grant(0, Phase.DECODE, steps=2), ZERO)
    one_pass = [
        (0, Half.ATTENTION),
        (0, Half.FFN),
        (1, Half.ATTENTION),
        (1, Half.FFN),
        (2, Half.ATTENTION),
    ]
    assert walk(in_flight, 1) == [(0, step, *task) for step in (0, 1) for task in one_pass]
    assert len(in_flight) == 0


def test_a_chunk_without_a_choice_has_no_head() -> None:
    in_flight = InFlight(ONE, lambda _: 2)
    in_flight.submit(grant(0, Phase.PREFILL, chooses=False), ZERO)
    assert [task[2:] for task in walk(in_flight, 1)][-1] == (1, Half.FFN)


def test_two_devices_work_on_two_micro_batches_at_once() -> None:
    in_flight = InFlight(TWO, lambda _: 2)
    in_flight.submit(grant(0, Phase.DECODE), ZERO)
    in_flight.submit(grant(1, Phase.DECODE, start_by=1), ZERO)
    first = in_flight.start(Team(0), ZERO)
    assert first is not None and in_flight.start(Team(1), ZERO) is None
    in_flight.finish(first, ZERO)
    ffn, attention = in_flight.start(Team(1), ZERO), in_flight.start(Team(0), ZERO)
    assert ffn is not None and (ffn.grant, ffn.half) == (0, Half.FFN)
    assert attention is not None and (attention.grant, attention.half) == (1, Half.ATTENTION)


def test_tensor_sharding_waits_for_every_part() -> None:
    in_flight = InFlight(Topology(("cpu:0",), ("cpu:1", "cpu:2"), Sharding.TENSOR), lambda _: 1)
    in_flight.submit(grant(0, Phase.DECODE), ZERO)
    attention = in_flight.start(Team(0), ZERO)
    assert attention is not None
    in_flight.finish(attention, ZERO)
    parts = [in_flight.start(Team(team), ZERO) for team in (1, 2)]
    assert [(part.part, part.parts) for part in parts if part] == [(0, 2), (1, 2)]
    in_flight.finish(parts[1], ZERO)  # type: ignore[arg-type]
    assert in_flight.start(Team(0), ZERO) is None
    in_flight.finish(parts[0], ZERO)  # type: ignore[arg-type]
    head = in_flight.start(Team(0), ZERO)
    assert head is not None and head.layer == 1


THREE = Topology(("cpu:0", "cpu:1", "cpu:2"), ("cpu:0",))


def pieces(in_flight: InFlight, teams: int) -> list[tuple[int, Half, Piece, int, int]]:
    """(layer, half, piece, team, part) in order."""
    seen = []
    while len(in_flight):
        started = [in_flight.start(Team(team), ZERO) for team in range(teams)]
        tasks = [task for task in started if task is not None]
        seen += [(task.layer, task.half, task.piece, int(task.team), task.part) for task in tasks]
        for task in tasks:
            in_flight.finish(task, ZERO)
    return seen


def test_a_half_with_pages_elsewhere_is_begun_and_ended_at_home() -> None:
    in_flight = InFlight(THREE, lambda _: 1)
    in_flight.submit(grant(0, Phase.DECODE, steps=2, elsewhere=(2,)), ZERO)
    one_pass = [
        (0, Half.ATTENTION, Piece.BEGIN, 0, 0),
        (0, Half.ATTENTION, Piece.PART, 0, 0),
        (0, Half.ATTENTION, Piece.PART, 2, 1),
        (0, Half.ATTENTION, Piece.END, 0, 0),
        (0, Half.FFN, Piece.WHOLE, 0, 0),
        (1, Half.ATTENTION, Piece.WHOLE, 0, 0),
    ]
    assert pieces(in_flight, 3) == one_pass * 2


def test_the_end_of_a_half_waits_for_every_part() -> None:
    in_flight = InFlight(THREE, lambda _: 1)
    in_flight.submit(grant(0, Phase.DECODE, elsewhere=(1, 2)), ZERO)
    begin = in_flight.start(Team(0), ZERO)
    assert begin is not None and in_flight.start(Team(1), ZERO) is None
    in_flight.finish(begin, ZERO)
    parts = [in_flight.start(Team(team), ZERO) for team in range(3)]
    for part in parts:
        assert part is not None and part.parts == 3
        assert in_flight.start(Team(0), ZERO) is None
        in_flight.finish(part, ZERO)
    end = in_flight.start(Team(0), ZERO)
    assert end is not None and end.piece is Piece.END


def test_what_is_left_of_a_half_in_pieces_comes_first_and_is_one_task_to_a_token() -> None:
    """A prefill's half has begun when a late token comes: the token waits for all of it, and for nothing
    more."""
    in_flight = InFlight(THREE, lambda _: 4)
    in_flight.submit(grant(0, Phase.PREFILL, chooses=False, elsewhere=(1,)), ZERO)
    begin = in_flight.start(Team(0), ZERO)
    assert begin is not None
    in_flight.finish(begin, Nanoseconds(5))
    in_flight.submit(grant(1, Phase.DECODE), Nanoseconds(5))
    order = pieces(in_flight, 2)
    assert [piece for _, _, piece, *_ in order[:3]] == [Piece.PART, Piece.PART, Piece.END]
    decode, chunk = order[3:12], order[12:]
    assert len(decode) == 9 and all(piece is Piece.WHOLE for _, _, piece, *_ in decode)
    assert chunk[0] == (0, Half.FFN, Piece.WHOLE, 0, 0)


def test_a_cancelled_row_ends_the_micro_batch_at_the_next_boundary() -> None:
    in_flight = InFlight(ONE, lambda _: 2)
    in_flight.submit(grant(0, Phase.DECODE), ZERO)
    task = in_flight.start(Team(0), ZERO)
    in_flight.cancel(RequestId(0))
    assert task is not None and in_flight.finish(task, ZERO)
    assert len(in_flight) == 0


def test_a_chunk_that_runs_when_a_late_token_arrives_is_its_one() -> None:
    in_flight = InFlight(ONE, lambda _: 4)
    in_flight.submit(grant(0, Phase.PREFILL, chooses=False), ZERO)
    running = in_flight.start(Team(0), ZERO)
    in_flight.submit(grant(1, Phase.DECODE), Nanoseconds(5))
    assert running is not None
    in_flight.finish(running, Nanoseconds(10))
    order = [identity for identity, *_ in walk(in_flight, 1)]
    assert order == [1] * 9 + [0] * 7


def test_a_chunk_that_runs_when_the_next_token_begins_is_its_one() -> None:
    in_flight = InFlight(TWO, lambda _: 1)
    in_flight.submit(grant(0, Phase.DECODE, steps=2, start_by=1000), ZERO)
    in_flight.submit(grant(1, Phase.PREFILL, chooses=False), ZERO)
    attention = in_flight.start(Team(0), ZERO)
    assert attention is not None and attention.grant == 1, "the decode has slack"
    in_flight.finish(attention, ZERO)
    chunk = in_flight.start(Team(1), ZERO)
    assert chunk is not None and chunk.grant == 1
    in_flight._chunks_running[GrantId(1)] = 2000
    batch = in_flight[GrantId(0)]
    batch.layer, batch.unstarted = 1, {Team(0): 0}
    head = in_flight.start(Team(0), ZERO)
    assert head is not None and (head.grant, head.layer) == (0, 1)
    in_flight.finish(head, Nanoseconds(10))
    assert (batch.step, batch.passed) == (1, 1)


def test_an_id_is_used_once() -> None:
    in_flight = InFlight(ONE, lambda _: 1)
    in_flight.submit(grant(0, Phase.DECODE), ZERO)
    with pytest.raises(InvariantError, match="grant 0"):
        in_flight.submit(grant(0, Phase.DECODE), ZERO)
