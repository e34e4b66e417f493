"""Whatever order devices run in that streams, events and flags allow, everybody says what they say alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from crosspool.core.batch import Grant, Phase, RetiredEvent, TokenEvent
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.kernels.triton.crossing import Carried, Flag
from crosspool.workers.cuda import lanes
from crosspool.workers.cuda.crossing import Stored, way_between
from crosspool.workers.cuda.elsewhere import Elsewhere
from crosspool.workers.cuda.feeder import FAILED, Feeder
from crosspool.workers.cuda.flight import Flight
from crosspool.workers.cuda.grant import GrantMemory, Span
from crosspool.workers.cuda.home import HomePlan
from crosspool.workers.cuda.lane_pass import LanePass
from crosspool.workers.cuda.lanes import LOOP_PASSES, Lane
from helpers_fake_devices import (
    ROUND_TIME,
    VOCAB,
    FakeAttention,
    FakeDevice,
    FakeEvent,
    FakeSides,
    FakeStream,
    Oracle,
)
from helpers_fake_life import LAYERS, LAYOUT, MOST_STEPS, PAGES, PLACEMENTS, Life, Sequence
from helpers_fake_spread import FakeElsewhere

pytestmark = pytest.mark.backend


def all_lives(placement: str, seeds: int, *, queues: bool = False) -> None:
    for seed in range(seeds):
        life = Life(seed, placement, queues=queues)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lanes, "LOOP_PASSES", 1 + seed % 4)
            life.live(600)
            life.finish()
        assert set(life.errors) == {None} and len(life.errors) > 10
        # A grant without a loop may be over before the host knows how long its pass has taken.
        unknown = set() if life.loops else {0}
        assert set(life.times) - unknown == {ROUND_TIME // (2 * LAYERS)}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_everybody_says_what_they_say_alone(placement: str) -> None:
    all_lives(placement, 25)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nobody_waits_for_ever_where_streams_share_queues(placement: str) -> None:
    all_lives(placement, 6, queues=True)


def test_two_that_wait_on_one_chip_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HomePlan, "way", lambda self, team, phase: way_between(*self.devices[:2], phase))
    all_lives("by tensor, two of one chip", 3)
    with pytest.raises(AssertionError):
        all_lives("by tensor, two of one chip", 3, queues=True)


@pytest.mark.parametrize("placement", ["two devices", "two of one chip", "by tensor, in three ways"])
def test_likewise_without_graphs(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanePass, "record", lambda self: None)
    all_lives(placement, 20)


CALLS = {
    "one device": {1},
    "two devices": {2},
    "two that reach nobody": {1},
    "two of one chip": {1},
    "by tensor": {3},
    "by tensor, in three ways": {2},
    "by tensor, two of one chip": {1},
    "two KV devices": {2, 3},
}
"""With several KV devices, fewer where contexts are at home."""


@pytest.mark.parametrize("placement", CALLS)
def test_a_token_is_one_launch_for_each_device_that_runs_by_itself(
    placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And two events, between which it is measured."""
    put, calls = Lane.put, set[int]()

    def counted(lane: Lane, flight: Flight) -> None:
        before, begins = lane.track.device.world.calls, lane._entered is not flight
        put(lane, flight)
        if flight.decoding and not begins:
            calls.add(lane.track.device.world.calls - before)

    monkeypatch.setattr(Lane, "put", counted)
    all_lives(placement, 3)
    assert calls == {launches + 2 for launches in CALLS[placement]}


# -- what must not be left out -----------------------------------------------------------------------------


def without_following(patch: pytest.MonkeyPatch, device: str) -> None:
    follow = FakeDevice.follow

    def some(self: FakeDevice, stream: FakeStream, leader: FakeStream) -> None:
        if self.name != device or self.world.capture is not None:
            follow(self, stream, leader)

    patch.setattr(FakeDevice, "follow", some)


def with_memory_given_back_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """Although empty passes of the grant are still in a stream."""
    retire = Feeder._retire

    def early(self: Feeder, flight: Flight) -> None:
        retire(self, flight)
        self._homes[0].memory.give_back(flight.packed.span)

    patch.setattr(Feeder, "_retire", early)
    patch.setattr(GrantMemory, "give_back", _once(GrantMemory.give_back))


def _once(give_back: Callable[[GrantMemory, Span], None]) -> Callable[[GrantMemory, Span], None]:
    given: list[Span] = []

    def once(self: GrantMemory, span: Span) -> None:
        if span in given:
            given.remove(span)
        else:
            given.append(span)
            give_back(self, span)

    return once


MUTATIONS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "weights do not wait for the home": ("two devices", lambda patch: without_following(patch, "b")),
    "the home does not wait for weights": ("two devices", lambda patch: without_following(patch, "a")),
    "one of three parts is not waited for": (
        "by tensor",
        lambda patch: patch.setattr(
            FakeDevice, "follow", _unless(FakeDevice.follow, lambda self, _, leader: leader.device == "c")
        ),
    ),
    "weights are not told how large a pass is": (
        "two devices",
        lambda patch: patch.setattr(Elsewhere, "crossing", lambda self, layer: self.there),
    ),
    "the flag comes before the rows": (
        "two devices",
        lambda patch: patch.setattr(FakeSides, "send", _late(FakeSides.send)),
    ),
    "a device is not launched": (
        "by tensor",
        lambda patch: patch.setattr(
            FakeDevice, "replay", _unless(FakeDevice.replay, lambda self, *_: self.name == "c")
        ),
    ),
    "nobody waits for a flag": (
        "two devices",
        lambda patch: patch.setattr(FakeSides, "receive", _counting),
    ),
    "the home's flags are not awaited": (
        "two devices",
        lambda patch: patch.setattr(
            Stored, "receive", _unless(Stored.receive, lambda self: self.target.team == 0)
        ),
    ),
    "streams do not wait for each other between grants": (
        "two that reach nobody",
        lambda patch: patch.setattr(Lane, "enter", _without_following(Lane.enter)),
    ),
    "other KV devices do not wait for the home": (
        "two KV devices",
        lambda patch: patch.setattr(
            Stored, "receive", _unless(Stored.receive, lambda self: self.target.team == 1)
        ),
    ),
    "the home does not wait for other KV devices": (
        "two KV devices",
        lambda patch: patch.setattr(
            Stored, "receive", _unless(Stored.receive, lambda self: self.source.team == 1)
        ),
    ),
    "page tables are not told": (
        "two KV devices",
        lambda patch: patch.setattr(Elsewhere, "crossing", lambda self, layer: self.there),
    ),
    "other KV devices take the home's page tables": (
        "two KV devices",
        lambda patch: patch.setattr(FakeElsewhere, "begin", lambda self: None),
    ),
    "one of two other KV devices does not attend": (
        "three KV devices, by tensor",
        lambda patch: patch.setattr(
            FakeElsewhere,
            "attention",
            _unless(FakeElsewhere.attention, lambda self, _: self._pages.first > PAGES),
        ),
    ),
    "a grant's words are not copied": (
        "one device",
        lambda patch: patch.setattr(Lane, "bind", _without_copy(Lane.bind)),
    ),
    "a lane keeps the grant that it had": (
        "one device",
        lambda patch: patch.setattr(
            Lane, "_enter", _unless(Lane._enter, lambda self, _: self._entered is not None)
        ),
    ),
    "chunks share a lane": (
        "one device",
        lambda patch: patch.setattr(Lane, "may_bind", property(lambda self: self.has_place)),
    ),
    "a grant is over when all of it is put": (
        "one device",
        lambda patch: patch.setattr(Flight, "ended", property(lambda self: not self.goes_on)),
    ),
    "a grant's memory is another's while it is queued": ("one device", with_memory_given_back_at_the_end),
    "whatever is put has run": (
        "one device",
        lambda patch: patch.setattr(FakeEvent, "done", lambda self: True),
    ),
}


def _unless(method: Callable[..., None], condition: Callable[..., bool]) -> Callable[..., None]:
    def guarded(*arguments: object) -> None:
        if not condition(*arguments):
            method(*arguments)

    return guarded


def _late(send: Callable[..., None]) -> Callable[..., None]:
    """Rows arrive with the next flag."""
    under_way: dict[int, tuple[Tensor, Tensor]] = {}

    def late(self: FakeSides, lane: Tensor, carried: Carried, sizes: Tensor | None, flag: Flag) -> None:
        for target, source in carried:
            old, under_way[target.data_ptr()] = under_way.get(target.data_ptr()), (target, source.clone())
            if old is not None:
                old[0].copy_(old[1])
        send(self, lane, [], sizes, flag)

    return late


def _counting(self: FakeSides, lane: Tensor, flag: Flag) -> None:
    flag.taken[0] += 1


def _without_following(enter: Callable[..., None]) -> Callable[..., None]:
    def without(self: Lane, *arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeDevice, "follow", lambda *_: None)
            enter(self, *arguments)

    return without


def _without_copy(bind: Callable[..., None]) -> Callable[..., None]:
    def without(self: Lane, flight: Flight) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeDevice, "copy", lambda *_: None)
            bind(self, flight)

    return without


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_it_is_seen_if(mutation: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    placement, mutate = MUTATIONS[mutation]
    mutate(monkeypatch)
    with pytest.raises((AssertionError, KeyError, ValueError, IndexError)), caplog.at_level(logging.CRITICAL):
        for seed in range(60):
            life = Life(seed, placement)
            life.live(600)
            life.finish()


# -- failures ----------------------------------------------------------------------------------------------


def test_what_cannot_be_launched_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Each fails at a random launch; whoever is beside it says what they say alone."""
    failed = 0
    for seed in range(20):
        life = Life(seed, "two devices")
        launch, rng = Flight.launch, random.Random(seed)

        def failing(flight: Flight, launch=launch, rng=rng) -> None:
            launch(flight)
            if rng.random() < 0.05:
                raise RuntimeError("no such kernel")

        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.CRITICAL):
            patch.setattr(Flight, "launch", failing)
            life.live(500)
        life.finish()
        failed += sum(error is not None for error in life.errors)
    assert failed > 10


@pytest.mark.parametrize("placement", ["two devices", "by tensor"])
def test_who_is_not_answered_fails_and_who_comes_later_does_not(
    placement: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While a device waits, the others run nothing, for longer than that."""
    failed = 0
    for seed in range(15):
        life = Life(seed, placement)
        life.silence = True
        while life.world.waiting is None:
            life.live(1)
        life.world.silent = {device.name for device in life.devices} - {life.world.waiting}
        with caplog.at_level(logging.CRITICAL):
            for _ in range(300):
                if life.world.lost_patience == 0:
                    life.live(1)
            life.world.silent.clear()
            life.live(300)
            life.finish()
        assert set(life.errors) <= {None, FAILED}
        failed += FAILED in life.errors
    assert failed > 10


@pytest.mark.parametrize("device", "ab")
def test_who_is_launched_alone_fails_alone(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """The home without the weights' device, or the other way round."""
    failed = 0
    replay = FakeDevice.replay
    for seed in range(20):
        life = Life(seed, "two devices")
        life.silence, rng = True, random.Random(seed)

        def failing(self: FakeDevice, *arguments: Any, rng: random.Random = rng) -> None:
            if self.name == device and rng.random() < 0.1:
                raise RuntimeError("no such graph")
            replay(self, *arguments)

        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.CRITICAL):
            patch.setattr(FakeDevice, "replay", failing)
            life.live(500)
            life.finish()
        assert set(life.errors) <= {None, FAILED}
        failed += FAILED in life.errors
    assert failed > 10


def test_a_lost_device_ends_what_is_at_home_there_and_what_comes(caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(20):
        life = Life(seed, "two devices")
        life.live(300)
        retired = len(life.errors)
        life.world.lost.add(random.Random(seed).choice("ab"))
        with caplog.at_level(logging.CRITICAL):
            for _ in range(20):
                life.live(20)
        life.feeder.step()
        life._take()
        assert life.feeder.broken is not None and life.feeder.idle
        assert len(life.errors) == len(life.grants)
        assert set(life.errors[retired:]) <= {None, FAILED}
        life._arrive()
        grants = len(life.grants)
        while len(life.grants) == grants:
            life._arrive()
            life._submit()
        assert isinstance(life.feeder.take_events()[-1], RetiredEvent)


# -- loops -------------------------------------------------------------------------------------------------


def decode(life: Life, rows: list[int], interval: int = 0) -> GrantId:
    """A grant of a decode whose rows want so many tokens, from prompts of one token."""
    parts = []
    for wanted in rows:
        life._next += 1
        pages = [life.free.pop() for _ in range(LAYOUT.chunks(1 + wanted))]
        oracle = Oracle(0, LAYERS, 1)
        new = Sequence(
            RequestId(life._next), 0, KvDevice(0), [life._next % VOCAB], wanted, oracle, pages, busy=True
        )
        inputs = new.prompt
        for _ in range(wanted):
            new.expected.append(oracle.next(inputs))
            inputs = new.expected[-1:]
        life.sequences[new.id] = new
        parts.append(new)
    number = GrantId(len(life.grants))
    life.grants[number], life.phases[number] = [(new, 1) for new in parts], Phase.DECODE
    packed = tuple(life._row(new, 1, new.wanted) for new in parts)
    times = (Nanoseconds(0), Nanoseconds(interval), Nanoseconds(50))
    life.feeder.submit(Grant(number, ModelIndex(0), Phase.DECODE, KvDevice(0), packed, max(rows), *times))
    return number


def looping_life() -> Life:
    """With one lane for decodes."""
    life = Life(0, "one device, loops", 1)
    life.devices[0].finish()
    return life


def looks(life: Life) -> Iterator[None]:
    """After each step of the world and of the host, before tokens are taken, until nothing is in flight."""
    for _ in range(MOST_STEPS):
        life.world.step()
        life.feeder.step()
        yield
        life._take()
        if life.feeder.idle:
            return
    raise AssertionError("it comes to no end")


def settle(life: Life) -> None:
    for _ in looks(life):
        pass


def decode_streams(life: Life) -> list[FakeStream]:
    return [lane.track.stream for lane in life.homes[0].lanes if lane.phase is Phase.DECODE]


def test_a_grant_alone_in_its_lane_is_launched_once() -> None:
    life = looping_life()
    decode(life, [20])
    settle(life)
    (stream,) = decode_streams(life)
    assert (stream.loops, stream.rounds) == (1, 20)
    assert life.times == [ROUND_TIME // (2 * LAYERS)]


def test_a_loop_that_is_not_looked_after_makes_what_it_may_and_is_launched_again() -> None:
    life = looping_life()
    decode(life, [20])
    (stream,) = decode_streams(life)
    for made in (LOOP_PASSES, 20):
        life.feeder.step()
        while life.world.step():
            pass
        assert stream.rounds == made
    life.feeder.step()
    life._take()
    assert stream.loops == 2 and life.feeder.idle and life.times == [ROUND_TIME // (2 * LAYERS)]


def test_grants_in_one_lane_take_turns() -> None:
    """The second comes while the first's loop runs, which lets it go before its next pass but one."""
    life = looping_life()
    first, turns = decode(life, [20]), []
    for _ in range(12):
        life.world.step()
        life.feeder.step()
    second = decode(life, [10])
    for _ in looks(life):
        turns += [event.grant for event in life.feeder._events if isinstance(event, TokenEvent)]
    begin = turns.index(second)
    assert turns[:begin].count(first) <= 12
    both = turns[begin : begin + 2 * 8]
    assert all(abs(both[:n].count(first) - both[:n].count(second)) <= 2 for n in range(len(both)))
    assert turns.count(first) == 20 and turns.count(second) == 10


def test_a_loop_goes_on_in_a_smaller_pass_when_rows_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes of up to 4 rows until the host has heard of it, and one more."""
    life, most = looping_life(), []
    end = FakeAttention.end

    def noting(self: FakeAttention) -> None:
        most.append(len(self.rows.numbers))
        end(self)

    monkeypatch.setattr(FakeAttention, "end", noting)
    decode(life, [3, 3, 20])
    settle(life)
    assert most[:3] == [4] * 3 and most[3:5] in ([4, 1], [1, 1]) and most[5:] == [1] * 15
    (stream,) = decode_streams(life)
    assert (stream.loops, stream.rounds) == (2, 20)


def test_a_recalled_loop_ends_with_its_pass() -> None:
    life = looping_life()
    number = decode(life, [20])
    flight = life.feeder._flights[number]
    for _ in looks(life):
        if flight.made:
            life.feeder.recall(number)
    (stream,) = decode_streams(life)
    assert (stream.loops, stream.rounds) == (1, 2)


def test_each_pass_of_a_loop_lets_one_layer_task_of_a_chunk_go_before_it() -> None:
    """The host notes when each begins, as it does for passes that it launches."""
    life = looping_life()
    number = decode(life, [20], interval=10**6)
    flight, begins = life.feeder._flights[number], []
    made = 0
    for _ in looks(life):
        if flight.made > made:
            made = flight.made
            begins.append(flight.start_by)
    assert len(set(begins[:-1])) == 19 and begins[:-1] == sorted(begins[:-1])


def test_a_lost_kv_device_ends_what_goes_there_and_lets_others_end(caplog: pytest.LogCaptureFixture) -> None:
    """Its streams stand still, and so do those that wait for them. Nothing begins any more, and when all that
    goes on has ended, nothing can be relied on."""
    went_on = failed = 0
    for seed in range(100):
        life = Life(seed, "two KV devices")
        life.live(50 + 3 * (seed % 50))
        life.world.lost.add("b")
        flights = list(life.feeder._flights.values())
        visited = any(flight.grant.elsewhere for flight in flights)
        there = any(flight.grant.kv_device == 1 and flight.queued for flight in flights)
        with caplog.at_level(logging.CRITICAL):
            for _ in range(600):
                life.world.step()
                life.feeder.step()
                life._take()
        assert life.feeder.idle and len(life.ends) == len(life.grants)
        assert (life.feeder.broken is not None) or not (visited or there)
        for flight in flights:
            error = life.ends[flight.grant.id]
            if flight.grant.kv_device == 0 and not visited:
                assert error is None
                went_on += 1
            failed += error == FAILED
        if life.feeder.broken is not None:
            grants = len(life.grants)
            while len(life.grants) == grants:
                life._arrive()
                life._submit()
            assert life.feeder.take_events()[-1].error == FAILED
    assert went_on > 5 and failed > 50
