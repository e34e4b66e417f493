"""What the engine refuses, ends early and counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crosspool.core.errors import (
    InvalidRequestError,
    InvariantError,
    ModelUnavailableError,
    RequestTooLargeError,
)
from crosspool.core.ids import RequestId
from crosspool.core.request import FinishReason
from helpers_control_plane import World, make_request, make_world
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4, max_context=200)
PAGE = 16 * SPEC.kv_bytes_per_token


def world_of(pages: int = 10) -> World:
    return make_world([SPEC, SPEC], page_bytes=PAGE, pages=pages)


def test_too_long_for_the_context_or_the_pool_says_the_numbers() -> None:
    world = world_of(pages=10)
    with pytest.raises(RequestTooLargeError, match=r"150 prompt tokens and 51 .* are 201 .* which is 200"):
        world.engine.add(make_request(0, (1,) * 150, 51))
    with pytest.raises(RequestTooLargeError, match=r"are 161 tokens, more than the KV pool.* is 160"):
        world.engine.add(make_request(0, (1,) * 111, 50))
    world.add(make_request(0, (1,) * 110, 50))
    world.run()
    assert len(world.outputs[RequestId(0)]) == 50


def test_an_empty_prompt_is_refused_and_one_token_is_enough() -> None:
    world = world_of()
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        world.engine.add(make_request(0, (), 5))
    world.add(make_request(1, (5,), 5))
    world.add(make_request(2, (5,) * 16, 16))
    world.run()
    for identity in (1, 2):
        request = world.requests[RequestId(identity)]
        assert world.outputs[request.id] == world.expected(request)


def test_a_model_that_failed_to_load_serves_nothing() -> None:
    world = world_of()
    models = (
        world.engine.info.models[0],
        replace(world.engine.info.models[1], error="its file is cut short"),
    )
    world.engine.info = replace(world.engine.info, models=models)
    with pytest.raises(ModelUnavailableError, match="model-1 does not serve: it failed to load") as caught:
        world.engine.add(make_request(0, (1,), 1, model=1))
    assert "cut short" not in str(caught.value)
    world.add(make_request(0, (1,), 1, model=0))
    world.run()


def test_an_id_in_use_is_a_bug_of_the_front() -> None:
    world = world_of()
    world.add(make_request(0, (1,), 1))
    with pytest.raises(InvariantError, match="id 0"):
        world.engine.add(make_request(0, (1,), 1))


def test_finish_keeps_what_came_before_the_stop_string() -> None:
    world = world_of()
    world.add(make_request(0, (1, 2, 3), 100))
    while len(world.outputs[RequestId(0)]) < 7:
        world.step()
        world.executor.advance()
    world.engine.finish(RequestId(0), 5)
    world.engine.finish(RequestId(0), 4)
    world.run()
    assert world.finished[RequestId(0)] is FinishReason.STOP
    assert world.engine.stats().kv_pages_held == 0


def test_abort_frees_pages_at_once_or_when_the_micro_batch_retires() -> None:
    world = world_of()
    world.add(make_request(0, (1,) * 64, 50))
    world.step()
    assert world.engine.stats().kv_pages_held > 0
    world.engine.abort(RequestId(0))
    world.engine.abort(RequestId(0))
    world.engine.abort(RequestId(99))
    world.step()
    assert world.finished[RequestId(0)] is FinishReason.ABORT
    assert world.engine.stats().kv_pages_held > 0, "a micro-batch in flight still writes there"
    world.executor.advance()
    world.step()
    assert world.engine.stats().kv_pages_held == 0
    assert not world.engine.has_work()


def test_a_failed_micro_batch_ends_its_requests_and_nobody_else() -> None:
    failing = iter([True])
    world = make_world([SPEC, SPEC], page_bytes=PAGE, pages=10, fails=lambda: next(failing, False))
    world.add(make_request(0, (1, 2), 5, model=0))
    world.step()
    while world.executor.advance():
        pass
    world.add(make_request(1, (1, 2), 5, model=1))
    world.run()
    assert world.finished == {RequestId(0): FinishReason.ERROR, RequestId(1): FinishReason.LENGTH}
    assert world.outputs[RequestId(1)] == world.expected(world.requests[RequestId(1)])


def test_the_counters_add_up() -> None:
    world = world_of()
    world.add(make_request(0, (1,) * 20, 6, model=0))
    world.add(make_request(1, (1,) * 3, 2, model=1))
    world.step()
    stats = world.engine.stats()
    held = sum(model.kv_pages_held for model in stats.models)
    assert held + stats.kv_pages_free == stats.kv_pages_total == 10
    assert [model.running for model in stats.models] == [1, 1]
    world.run()
    stats = world.engine.stats()
    assert stats.kv_pages_cached and stats.kv_pages_cached + stats.kv_pages_free == stats.kv_pages_total
    first, second = stats.models
    assert (first.prompt_tokens, first.generation_tokens, first.finished) == (20, 6, {"length": 1})
    assert (second.prompt_tokens, second.generation_tokens, second.running) == (3, 2, 0)
