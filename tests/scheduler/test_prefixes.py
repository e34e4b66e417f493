"""Sequences that begin alike compute it once, seen through the engine in virtual time."""

from __future__ import annotations

import pytest

from crosspool.core.batch import Phase, TokenEvent
from crosspool.core.config import SchedulerConfig
from crosspool.core.ids import KvDevice, RequestId
from crosspool.core.request import FinishReason
from helpers_control_plane import World, make_request, make_world
from helpers_grants import Recorder
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)
PAGE = 16 * SPEC.kv_bytes_per_token  # one group, 16 tokens
PROMPT = tuple(range(90))
CONFIG = SchedulerConfig(chunk_quantum=16, max_chunk_tokens=32, decode_steps=4, outgrowth_risk=1.0)


def world_of(pages: int = 60, **options: object) -> tuple[World, Recorder]:
    world = make_world([SPEC, SPEC], page_bytes=PAGE, pages=pages, scheduler=CONFIG, **options)
    return world, Recorder(world)


def prefilled(recorder: Recorder) -> dict[int, list[tuple[int, int]]]:
    """(start, tokens) of every prompt chunk by request."""
    chunks: dict[int, list[tuple[int, int]]] = {}
    for grant in recorder.of(Phase.PREFILL):
        for row in grant.rows:
            chunks.setdefault(row.request, []).append((row.start, len(row.tokens)))
    return chunks


def assert_right(world: World) -> None:
    world.engine.check()
    for identity, request in world.requests.items():
        if world.finished[identity] is FinishReason.LENGTH:
            assert world.outputs[identity] == world.expected(request)


def cached_tokens(world: World, model: int = 0) -> int:
    return world.engine.stats().models[model].cached_tokens


def test_a_prompt_seen_before_is_not_computed_again_but_for_its_last_chunk() -> None:
    world, recorder = world_of()
    for identity in range(2):
        world.add(make_request(identity, PROMPT, 5))
        world.run()
    assert prefilled(recorder)[1] == [(80, 10)]
    assert cached_tokens(world) == 80
    assert_right(world)


def test_cached_tokens_are_told_though_the_tokens_went_into_the_pipe() -> None:
    world, _ = world_of()
    poll = world.executor.poll
    world.executor.poll = lambda: [  # type: ignore[method-assign]
        event._replace(delivered=event.finish is None) if isinstance(event, TokenEvent) else event
        for event in poll()
    ]
    told: list[tuple[int, int]] = []
    for identity in range(2):
        world.add(make_request(identity, PROMPT, 9))
        while RequestId(identity) not in world.finished:
            told += [(o.request, o.cached_tokens) for o in world.step() if o.cached_tokens]
            world.executor.advance()
    assert told == [(1, 80)]


def test_the_last_token_of_a_prompt_of_whole_chunks_is_computed() -> None:
    world, recorder = world_of()
    for identity in range(2):
        world.add(make_request(identity, PROMPT[:64], 5))
        world.run()
    assert prefilled(recorder)[1] == [(48, 16)]
    assert_right(world)


def test_a_session_finds_its_own_answers() -> None:
    world, recorder = world_of()
    history = PROMPT[:20]
    for turn in range(4):
        world.add(make_request(turn, history, 30))
        world.run()
        history = (*history, *world.outputs[RequestId(turn)], 7, 8, 9)
        if turn:
            # All but the last token of the answer before were computed, in whole chunks.
            before = len(world.requests[RequestId(turn - 1)].prompt_token_ids) + 30 - 1
            assert prefilled(recorder)[turn][0][0] == before // 16 * 16
    assert_right(world)


def test_an_answer_cut_at_a_stop_string_is_found_as_far_as_it_went() -> None:
    world, recorder = world_of()
    world.add(make_request(0, PROMPT[:20], 100))
    while len(world.outputs[RequestId(0)]) < 50:
        world.step()
        world.executor.advance()
    world.engine.finish(RequestId(0), 40)
    world.run()
    world.add(make_request(1, (*PROMPT[:20], *world.outputs[RequestId(0)][:40], 1), 5))
    world.run()
    assert prefilled(recorder)[1][0][0] == 48
    assert_right(world)


def test_choices_of_one_prompt_compute_it_once() -> None:
    world, recorder = world_of()
    for identity in range(4):
        world.add(make_request(identity, PROMPT, 5))
    world.run()
    chunks = prefilled(recorder)
    assert chunks[0] == [(0, 32), (32, 32), (64, 26)]
    assert all(chunks[identity] == [(80, 10)] for identity in (1, 2, 3))
    assert_right(world)


def test_choices_do_not_compute_the_same_in_one_micro_batch_or_in_two() -> None:
    config = SchedulerConfig(chunk_quantum=16, max_chunk_tokens=512)
    for weights_devices in (("cpu:0",), ("cpu:1",)):
        world = make_world(
            [SPEC], page_bytes=PAGE, pages=60, scheduler=config, weights_devices=weights_devices
        )
        recorder = Recorder(world)
        for identity in range(3):
            world.add(make_request(identity, PROMPT, 5))
        world.run()
        assert prefilled(recorder) == {0: [(0, 90)], 1: [(80, 10)], 2: [(80, 10)]}
        assert_right(world)


def test_who_waits_for_another_goes_on_alone_when_that_one_ends() -> None:
    world, recorder = world_of()
    for identity in range(3):
        world.add(make_request(identity, PROMPT, 5))
    world.step()
    assert set(prefilled(recorder)) == {0}
    world.engine.abort(RequestId(0))
    world.run()
    assert prefilled(recorder)[1][0][0] in (0, 32)
    assert world.finished[RequestId(1)] is FinishReason.LENGTH
    assert_right(world)


def test_a_failed_micro_batch_is_not_published() -> None:
    failing = iter([False, True])
    world, recorder = world_of(fails=lambda: next(failing, False))
    world.add(make_request(0, PROMPT, 5))
    world.run()
    assert world.finished[RequestId(0)] is FinishReason.ERROR
    world.add(make_request(1, PROMPT, 5))
    world.run()
    assert prefilled(recorder)[1][0] == (32, 32), "the first micro-batch was good"
    assert_right(world)


def test_tokens_of_a_failed_micro_batch_are_not_published() -> None:
    failing = iter([False, True])
    world, recorder = world_of(fails=lambda: next(failing, False))
    world.add(make_request(0, PROMPT[:14], 20))
    world.run()
    output = world.outputs[RequestId(0)]
    assert world.finished[RequestId(0)] is FinishReason.ERROR and len(output) > 3
    world.add(make_request(1, (*PROMPT[:14], *output, 1, 2, 3), 5))
    world.run()
    assert prefilled(recorder)[1][0][0] == 0
    assert_right(world)


def test_tenants_and_models_do_not_share() -> None:
    world, recorder = world_of()
    world.add(make_request(0, PROMPT, 5, tenant=b"a"))
    world.run()
    world.add(make_request(1, PROMPT, 5, tenant=b"b"))
    world.add(make_request(2, PROMPT, 5, tenant=b"a", model=1))
    world.run()
    assert [prefilled(recorder)[identity][0] for identity in (1, 2)] == [(0, 32), (0, 32)]
    assert cached_tokens(world) == cached_tokens(world, 1) == 0


def test_without_the_cache_everything_is_computed_and_freed() -> None:
    world, recorder = world_of(prefix_cache=False)
    for identity in range(2):
        world.add(make_request(identity, PROMPT, 5))
        world.run()
    assert prefilled(recorder)[1][0] == (0, 32)
    stats = world.engine.stats()
    assert stats.kv_pages_free == stats.kv_pages_total and cached_tokens(world) == 0


def test_cached_pages_hold_nobody_up() -> None:
    """A pool full of cached pages admits and grows as an empty one, and preempts nobody."""
    world, _ = world_of(pages=10)
    world.add(make_request(0, PROMPT, 60))
    world.run()
    assert world.engine.stats().kv_pages_cached == 9
    world.add(make_request(1, tuple(range(100, 160)), 100, model=1))
    world.step()
    assert world.engine.stats().kv_pages_cached < 9
    world.run()
    stats = world.engine.stats()
    assert stats.models[0].cached_pages_evicted > 0 and stats.models[1].preemptions == 0
    assert_right(world)


def test_shared_pages_are_counted_once_when_a_request_is_admitted() -> None:
    """Four requests of 6 pages each, and room to grow, fit 14 pages, because 5 of them are the same."""
    world, _ = world_of(pages=14)
    for identity in range(4):
        world.add(make_request(identity, PROMPT, 6))
    most = 0
    while len(world.finished) < 4:
        world.step()
        most = max(most, world.engine.stats().models[0].running)
        world.executor.advance()
    assert most == 4
    assert world.engine.stats().models[0].preemptions == 0
    assert_right(world)


def test_a_preempted_sequence_finds_what_is_left_of_its_own() -> None:
    world, recorder = world_of(pages=9)
    world.add(make_request(0, PROMPT[:48], 60))
    world.add(make_request(1, tuple(range(100, 148)), 60))
    world.run()
    assert world.engine.stats().models[0].preemptions > 0
    assert cached_tokens(world) == 0, "what it had computed itself is not told as cached"
    again = [start for start, _ in prefilled(recorder)[1] if start]
    assert again and any(start > 32 for start in again)
    assert_right(world)


def test_a_request_goes_where_its_prefix_is() -> None:
    world, recorder = world_of(kv_devices=("cpu:0", "cpu:1"))
    world.add(make_request(0, PROMPT, 3))
    world.run()
    world.add(make_request(1, tuple(range(200, 290)), 40))
    world.step()
    world.add(make_request(2, PROMPT, 3))
    world.run()
    devices = {row.request: grant.kv_device for grant in recorder.grants for row in grant.rows}
    assert devices == {0: KvDevice(0), 1: devices[1], 2: KvDevice(0)}
    assert prefilled(recorder)[2] == [(80, 10)]
