"""Who is copied to host memory, when the pages are free, and what comes back."""

from __future__ import annotations

import pytest

from crosspool.core.batch import Event, Grant
from crosspool.core.config import SchedulerConfig
from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import Nanoseconds, RequestId
from crosspool.core.info import ModelStats
from crosspool.core.request import EngineOutput, FinishReason
from crosspool.costs.layer import HardwareProfile
from crosspool.pools.quotas import Quota
from crosspool.scheduler.sequence import State, Wait
from helpers_control_plane import World, make_request, make_world
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)
PAGE = 16 * SPEC.kv_bytes_per_token  # one group, 16 tokens
CONFIG = SchedulerConfig(chunk_quantum=16, max_chunk_tokens=32, decode_steps=2, outgrowth_risk=1.0)
FAST, SLOW = 1e10, 1e3
FIRST, SECOND = RequestId(0), RequestId(1)


def profile(copy_bytes_per_second: float) -> HardwareProfile:
    return HardwareProfile(task_overhead=Nanoseconds(10_000), copy_bytes_per_second=copy_bytes_per_second)


def crowded(
    spill_pages: int = 100, copy_bytes_per_second: float = FAST, *, pages: int = 6, **how: object
) -> World:
    """Two requests that grow to 5 pages each, where there are 6: the second is preempted."""
    world = make_world(
        [SPEC],
        page_bytes=PAGE,
        pages=pages,
        scheduler=CONFIG,
        profile=profile(copy_bytes_per_second),
        spill_pages=spill_pages,
        **how,  # type: ignore[arg-type]
    )
    world.copies = []  # type: ignore[attr-defined]
    copy = world.executor.copy

    def note(each: PageCopy) -> None:
        world.copies.append(each)  # type: ignore[attr-defined]
        copy(each)

    world.executor.copy = note  # type: ignore[method-assign]
    for identity in (0, 1):
        world.add(make_request(identity, (identity, *range(1, 16)), 60))
    return world


def run_until(world: World, request: RequestId, state: State) -> None:
    for _ in range(10_000):
        world.step()
        world.engine.check()
        if world.state(request) is state:
            return
        assert world.executor.advance(), f"request {request} was never {state}"
    raise AssertionError(f"request {request} was never {state}")


def stats_of(world: World) -> ModelStats:
    return world.engine.stats().models[0]


def assert_ended_well(world: World) -> None:
    world.run()
    for identity, request in world.requests.items():
        assert world.outputs[identity] == world.expected(request)
    assert world.engine.stats().spill_used_bytes == 0


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    world = crowded()
    grants: list[Grant] = []
    submit = world.executor.submit
    world.executor.submit = lambda grant: (grants.append(grant), submit(grant))[0]  # type: ignore
    run_until(world, SECOND, State.SPILLING)
    known = len(world.outputs[SECOND])
    del grants[:]
    assert_ended_well(world)
    rows = [row for grant in grants for row in grant.rows if row.request == SECOND]
    assert [len(row.tokens) for row in rows] == [1] * len(rows), "nothing is computed again"
    assert rows[0].start == 16 + known - 1
    stats, sizes = stats_of(world), [copy.size for copy in world.copies]  # type: ignore[attr-defined]
    assert stats.preemptions == stats.spilled_sequences == stats.returned_sequences == 1
    assert (stats.spilled_bytes, stats.returned_bytes) == tuple(sizes)


def test_pages_are_free_only_when_they_have_been_copied() -> None:
    """Meanwhile whoever needs them stalls, and preempts nobody else."""
    world = crowded()
    run_until(world, SECOND, State.SPILLING)
    assert world.engine.waits() == {FIRST: Wait.STALLED, SECOND: Wait.PREEMPTED}
    held, copy = stats_of(world).kv_pages_held, world.copies[0]  # type: ignore[attr-defined]
    assert held == 6 and copy.direction is Direction.OUT
    assert world.engine.stats().spill_used_bytes == copy.size == len(copy.pages) * PAGE
    world.step()
    assert stats_of(world).kv_pages_held == held and stats_of(world).preemptions == 1
    run_until(world, SECOND, State.WAITING)
    assert stats_of(world).kv_pages_held < held
    assert world.engine.waits() == {SECOND: Wait.PREEMPTED}
    assert_ended_well(world)


def test_a_spilled_sequence_holds_no_page_and_comes_back_to_other_pages() -> None:
    world = crowded(prefix_cache=False)
    run_until(world, SECOND, State.WAITING)
    sequence = world.engine._scheduler.get(SECOND)
    assert sequence is not None and sequence.table is None and sequence.spilled is not None
    run_until(world, SECOND, State.RETURNING)
    out, back = world.copies  # type: ignore[attr-defined]
    assert back.direction is Direction.IN and back.host_pages == out.host_pages
    assert back.pages != out.pages
    assert_ended_well(world)


@pytest.mark.parametrize(("bandwidth", "spills"), [(FAST, 1), (SLOW, 0)])
def test_the_cheaper_is_chosen(bandwidth: float, spills: int) -> None:
    world = crowded(copy_bytes_per_second=bandwidth)
    assert_ended_well(world)
    assert stats_of(world).preemptions > 0
    assert stats_of(world).spilled_sequences == spills


def test_the_bandwidth_is_that_of_the_copies_there_have_been() -> None:
    """What was expected to be fast takes a thousand times as long: the next one computes its tokens again."""
    world = crowded(spill_pages=100)
    copier = world.executor._copier
    time_of = copier._time_of
    copier._time_of = lambda copy: 1000 * time_of(copy)
    assert_ended_well(world)
    assert (stats_of(world).preemptions, stats_of(world).spilled_sequences) == (1, 1)
    for identity in (2, 3):
        world.add(make_request(identity, (identity, *range(1, 16)), 60))
    assert_ended_well(world)
    assert (stats_of(world).preemptions, stats_of(world).spilled_sequences) == (2, 1)


@pytest.mark.parametrize("pages", [0, 2])
def test_without_room_in_the_store_tokens_are_computed_again(pages: int) -> None:
    world = crowded(spill_pages=pages)
    assert_ended_well(world)
    assert stats_of(world).preemptions > 0 and world.copies == []  # type: ignore[attr-defined]
    assert world.engine.stats().spill_store_bytes == pages * PAGE


@pytest.mark.parametrize(("shared", "pages"), [(True, 14), (False, 21)])
def test_what_another_holds_too_need_not_be_computed_again(shared: bool, pages: int) -> None:
    """The second has most of its tokens in common with the first, which keeps them in the pool: to compute
    the few others is cheaper than to copy them all."""
    world = make_world(
        [SPEC],
        page_bytes=PAGE,
        pages=pages,
        scheduler=CONFIG,
        profile=profile(2e8),
        spill_pages=100,
        prefix_cache=shared,
    )
    for identity in (0, 1):
        world.add(make_request(identity, (*range(16), *range(16)) * 4 + (identity,), 60))
    assert_ended_well(world)
    assert stats_of(world).preemptions == 1
    assert stats_of(world).spilled_sequences == (not shared)


def test_what_is_in_the_prefix_cache_is_not_copied_back() -> None:
    world = crowded(pages=8)
    world.add(make_request(2, (2, *range(1, 16)), 60))
    assert_ended_well(world)
    stats = stats_of(world)
    assert stats.spilled_sequences == stats.returned_sequences > 0
    assert 0 < stats.returned_bytes < stats.spilled_bytes


@pytest.mark.parametrize("state", [State.SPILLING, State.WAITING, State.RETURNING])
@pytest.mark.parametrize("finish", [False, True])
def test_who_ends_gives_back_the_store(state: State, finish: bool) -> None:
    world = crowded(prefix_cache=False)
    run_until(world, SECOND, State.SPILLING)
    run_until(world, SECOND, state)
    cancelled: list[RequestId] = []
    world.executor.cancel = cancelled.append  # type: ignore[method-assign]
    if finish:
        world.engine.finish(SECOND, 1)
    else:
        world.engine.abort(SECOND)
    copying = state is not State.WAITING
    assert cancelled == [SECOND] * copying
    assert world.state(SECOND) is (State.DRAINING if copying else None)
    assert (world.engine.stats().spill_used_bytes > 0) == copying
    world.engine.check()
    world.run()
    world.engine.check()
    assert world.finished[SECOND] is (FinishReason.STOP if finish else FinishReason.ABORT)
    assert world.outputs[FIRST] == world.expected(world.requests[FIRST])
    assert world.engine.stats().spill_used_bytes == 0 == world.engine.stats().kv_pages_held
    assert stats_of(world).returned_sequences == 0


@pytest.mark.parametrize(("copy", "state"), [(0, State.SPILLING), (1, State.RETURNING)])
def test_a_copy_that_fails_ends_its_request_alone(copy: int, state: State) -> None:
    """Whatever is in pages and store then, nobody goes on with it."""
    world = crowded(prefix_cache=False)
    poll = world.executor.poll

    def failing() -> list[Event]:
        events = poll()
        return [
            event._replace(time=Nanoseconds(0), error="the device is gone")
            if isinstance(event, CopiedEvent) and event.copy == copy
            else event
            for event in events
        ]

    world.executor.poll = failing  # type: ignore[method-assign]
    run_until(world, SECOND, State.SPILLING)
    run_until(world, SECOND, state)
    said: list[EngineOutput] = []
    while world.state(SECOND) is not None:
        world.executor.advance()
        said += world.step()
        world.engine.check()
    assert world.finished[SECOND] is FinishReason.ERROR
    assert said[-1].error == "the device is gone"
    world.run()
    world.engine.check()
    assert world.outputs[FIRST] == world.expected(world.requests[FIRST])
    assert world.outputs[SECOND] == world.expected(world.requests[SECOND])[: len(world.outputs[SECOND])]
    assert world.engine.stats().spill_used_bytes == 0 == world.engine.stats().kv_pages_held
    assert (stats_of(world).spilled_sequences, stats_of(world).returned_sequences) == (copy, 0)


def test_a_spilled_sequence_claims_nothing_of_its_models_share() -> None:
    """Two models with fixed shares: while one's sequence is in host memory, its floor is free for others of
    that model, and the other model notices nothing."""
    world = make_world(
        [SPEC, SPEC],
        page_bytes=PAGE,
        pages=12,
        scheduler=CONFIG,
        profile=profile(FAST),
        spill_pages=100,
        quotas=[Quota(6, 6), Quota(6, 6)],
        prefix_cache=False,
    )
    for identity in (0, 1):
        world.add(make_request(identity, (identity, *range(1, 16)), 60))
    run_until(world, SECOND, State.WAITING)
    assert world.engine._pool.held_by(0) <= 5  # type: ignore[arg-type]
    world.add(make_request(2, tuple(range(16)), 80, model=1))
    assert_ended_well(world)
    assert stats_of(world).spilled_sequences == 1
    assert world.engine.stats().models[1].preemptions == 0


def test_check_finds_a_copy_of_pages_that_were_given_back() -> None:
    world = crowded()
    run_until(world, SECOND, State.SPILLING)
    sequence = world.engine._scheduler.get(SECOND)
    assert sequence is not None and sequence.table is not None
    world.engine._pool.release(sequence.table)
    with pytest.raises(InvariantError, match="of pages it does not hold"):
        world.engine.check()
