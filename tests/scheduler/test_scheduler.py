"""Single decisions of the scheduler, seen through the engine in virtual time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from crosspool.core.batch import Grant, Phase
from crosspool.core.config import SchedulerConfig
from crosspool.core.errors import OverloadedError
from crosspool.core.ids import GrantId, Nanoseconds, RequestId
from crosspool.core.in_flight import LayerTask
from crosspool.core.request import FinishReason
from crosspool.costs.layer import HardwareProfile
from crosspool.scheduler.sequence import State
from helpers_control_plane import MILLISECOND, make_request, make_world
from helpers_grants import Recorder
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)
PAGE = 16 * SPEC.kv_bytes_per_token  # one group, 16 tokens
PROMPT = tuple(range(16))


def small_steps(**changes: int) -> SchedulerConfig:
    """Without a gate of risk: what happens when the pool is full is to be seen."""
    values: dict[str, float] = {
        "chunk_quantum": 16,
        "max_chunk_tokens": 32,
        "decode_steps": 2,
        "outgrowth_risk": 1.0,
        **changes,
    }
    return SchedulerConfig(**values)  # type: ignore[arg-type]


def test_prompts_are_cut_into_quanta_and_the_rest() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=20, scheduler=small_steps())
    recorder = Recorder(world)
    world.add(make_request(0, tuple(range(75)), 1))
    world.run()
    rows = [grant.rows[0] for grant in recorder.of(Phase.PREFILL)]
    assert [(row.start, len(row.tokens), row.choice is not None) for row in rows] == [
        (0, 32, False),
        (32, 32, False),
        (64, 11, True),
    ]


def test_chunks_shrink_where_a_layer_would_take_longer_than_it_may() -> None:
    """A query late in a prompt attends to more: the same number of tokens takes longer there."""
    profile = HardwareProfile(operations_per_second=2e8, task_overhead=Nanoseconds(1000))
    config = small_steps(max_chunk_tokens=128, chunk_layer_cost=4 * MILLISECOND)
    world = make_world([SPEC], page_bytes=PAGE, pages=300, scheduler=config, profile=profile)
    recorder = Recorder(world)
    world.add(make_request(0, tuple(range(97)) * 40, 1))
    world.run()
    grants = recorder.of(Phase.PREFILL)
    sizes = [len(grant.rows[0].tokens) for grant in grants[:-1]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1] == 16
    assert all(
        grant.layer_cost <= 4 * MILLISECOND or len(grant.rows[0].tokens) == 16 for grant in grants[:-1]
    )


def test_windowed_sequences_are_admitted_by_what_they_hold_not_by_a_chunk_they_never_need() -> None:
    spec = gqa_spec(windows=(32, 32, 32, 32))
    config = small_steps(chunk_quantum=16, max_chunk_tokens=512)
    world = make_world([spec], page_bytes=PAGE, pages=60, scheduler=config)
    for identity in range(30):
        world.add(make_request(identity, PROMPT, 100))
    most = 0
    while world.engine.has_work():
        world.step()
        most = max(most, world.engine.stats().models[0].running)
        world.executor.advance()
    assert most >= 15


def test_sequences_of_one_model_decode_together_and_newcomers_join() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=40, scheduler=small_steps())
    recorder = Recorder(world)
    for identity in range(3):
        world.add(make_request(identity, PROMPT, 12))
    world.run()
    assert max(len(grant.rows) for grant in recorder.of(Phase.DECODE)) == 3
    assert all(world.outputs[RequestId(i)] == world.expected(world.requests[RequestId(i)]) for i in range(3))


def test_models_do_not_wait_for_each_other() -> None:
    world = make_world([SPEC, mla_spec()], page_bytes=PAGE, pages=60, scheduler=small_steps())
    recorder = Recorder(world)
    world.add(make_request(0, PROMPT, 9, model=0))
    world.add(make_request(1, tuple(range(50)), 9, model=1))
    world.run()
    assert {grant.model for grant in recorder.grants} == {0, 1}
    assert all(len({row.request for row in grant.rows}) == 1 for grant in recorder.grants)
    assert len(world.finished) == 2


def test_more_sequences_than_rows_take_turns() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=60, scheduler=small_steps(max_batch_rows=2))
    recorder = Recorder(world)
    for identity in range(5):
        world.add(make_request(identity, PROMPT, 10))
    world.run()
    turns = [{row.request for row in grant.rows} for grant in recorder.of(Phase.DECODE)]
    assert set().union(*turns[:6]) == {0, 1, 2, 3, 4}


def test_a_full_pool_preempts_the_latest_deadline_and_the_output_stays() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=6, scheduler=small_steps())
    for identity in range(3):
        world.add(make_request(identity, (identity, *PROMPT[1:]), 60))
    preempted: list[int] = []
    while len(world.finished) < 3:
        world.step()
        for identity in range(3):
            sequence = world.engine._scheduler.get(RequestId(identity))
            if sequence is not None and sequence.preemptions and identity not in preempted:
                preempted.append(identity)
        world.executor.advance()
    assert preempted and 0 not in preempted, "the earliest is never preempted"
    for identity in range(3):
        assert world.outputs[RequestId(identity)] == world.expected(world.requests[RequestId(identity)])


def test_who_stalls_for_pages_goes_on_when_they_are_free() -> None:
    """The later one cannot grow while the earlier, slower one holds the rest; then that one ends."""
    slow = gqa_spec(layers=8, head_dim=2)
    world = make_world([slow, SPEC], page_bytes=PAGE, pages=4, scheduler=small_steps(decode_steps=1))
    world.add(make_request(0, tuple(range(33)), 31, model=0))
    world.add(make_request(1, tuple(range(8)), 50, model=1))
    while not world.engine._scheduler._running._stalled:
        world.step()
        assert world.executor.advance(), "nobody ever stalled"
    assert world.state(RequestId(1)) is State.DECODING
    world.run()
    assert world.outputs[RequestId(1)] == world.expected(world.requests[RequestId(1)])


def test_a_request_that_is_small_may_pass_one_that_does_not_fit_yet_until_it_has_aged() -> None:
    config = small_steps(ttft_target=10 * MILLISECOND)
    world = make_world([SPEC, SPEC], page_bytes=PAGE, pages=8, scheduler=config)
    world.add(make_request(0, PROMPT, 90, model=0))
    world.step()
    world.add(make_request(1, tuple(range(97)), 8, model=1))
    world.add(make_request(2, (1,), 2, model=0))
    world.step()
    assert world.state(RequestId(1)) is State.WAITING
    assert world.state(RequestId(2)) is State.PREFILLING
    while world.clock.now() < 41 * MILLISECOND:
        world.step()
        if not world.executor.advance(41 * MILLISECOND):
            world.clock.advance_to(41 * MILLISECOND)
    if world.state(RequestId(1)) is State.WAITING:
        world.add(make_request(3, (1,), 2, model=0))
        world.step()
        assert world.state(RequestId(3)) is State.WAITING
    world.run()


def test_a_full_line_refuses() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=8, scheduler=small_steps(max_waiting=2))
    world.add(make_request(0, PROMPT, 2))
    world.add(make_request(1, PROMPT, 2))
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        world.engine.add(make_request(2, PROMPT, 2))
    world.run()
    assert set(world.finished.values()) == {FinishReason.LENGTH}


def test_a_lone_model_on_two_devices_is_split_in_two() -> None:
    for weights, lanes in ((("cpu:1",), 2), (("cpu:0",), 1)):
        world = make_world(
            [SPEC], page_bytes=PAGE, pages=60, scheduler=small_steps(), weights_devices=weights
        )
        for identity in range(4):
            world.add(make_request(identity, PROMPT, 20))
        most = 0
        while world.engine.has_work():
            world.step()
            decoding = [b for b in world.executor.in_flight.batches if b.decoding]
            most = max(most, len(decoding))
            world.executor.advance()
        assert most == lanes


class TasksBetweenTokens:
    """Counts the prefill layer tasks that begin between one request's tokens."""

    def __init__(self) -> None:
        self.prefills: set[GrantId] = set()
        self.begun: list[tuple[int, LayerTask]] = []

    def watch(self, task: LayerTask, start: int, end: int) -> None:
        if task.grant in self.prefills:
            self.begun.append((start, task))

    def largest(self, token_times: list[int]) -> int:
        counts = []
        for before, after in pairwise(token_times):
            counts.append(
                len(
                    {
                        (task.grant, task.layer, task.half)
                        for start, task in self.begun
                        if before <= start < after
                    }
                )
            )
        return max(counts)


@pytest.mark.parametrize("weights_devices", [("cpu:0",), ("cpu:1",)])
def test_without_slack_a_token_waits_for_one_prefill_layer_task_and_prefill_goes_on(
    weights_devices: tuple[str, ...],
) -> None:
    counter = TasksBetweenTokens()
    config = small_steps(decode_steps=8, ttft_target=1, tbt_target=1, chunk_layer_cost=1000 * MILLISECOND)
    world = make_world(
        [SPEC, mla_spec()],
        page_bytes=PAGE,
        pages=400,
        scheduler=config,
        weights_devices=weights_devices,
        profile=HardwareProfile(operations_per_second=1e8, task_overhead=Nanoseconds(10_000)),
        watch=counter.watch,
    )
    submit = world.executor.submit

    def note(grant: Grant) -> None:
        if grant.phase is Phase.PREFILL and grant.model == 1:
            counter.prefills.add(grant.id)
        submit(grant)

    world.executor.submit = note  # type: ignore[method-assign]
    decoder = make_request(0, PROMPT, 300)
    world.add(decoder)
    while len(world.outputs[decoder.id]) < 20:
        world.step()
        world.executor.advance()
    world.add(make_request(1, tuple(range(300)), 1, model=1))
    times: list[int] = []
    while RequestId(1) not in world.finished:
        before = len(world.outputs[decoder.id])
        world.step()
        times += [world.clock.now()] * (len(world.outputs[decoder.id]) - before)
        assert world.executor.advance()
        assert decoder.id not in world.finished, "prefill starves"
    assert len(counter.begun) >= 10 * 2 * 3, "ten chunks of three layers"
    assert counter.largest(times) == 1


def test_prefill_uses_the_slack_before_the_next_token_is_due() -> None:
    """With a generous target, chunks run together between tokens, and every token is still in time."""
    config = small_steps(tbt_target=50 * MILLISECOND, ttft_target=5000 * MILLISECOND)
    world = make_world([SPEC, SPEC], page_bytes=PAGE, pages=400, scheduler=config)
    world.add(make_request(0, PROMPT, 40, model=0))
    while len(world.outputs[RequestId(0)]) < 4:
        world.step()
        world.executor.advance()
    world.add(make_request(1, tuple(range(90)) * 20, 1, model=1))
    world.run()
    gaps = [after - before for before, after in pairwise(world.token_times[RequestId(0)])]
    assert max(gaps) <= 50 * MILLISECOND
    tokens_before = sum(time < world.token_times[RequestId(1)][0] for time in world.token_times[RequestId(0)])
    assert tokens_before < 30, "the prompt did not have to wait for the other's tokens"


# -- long grants, and who ends them early -------------------------------------------------------------------


def test_a_lone_decode_keeps_its_grant_for_all_its_steps() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=400, scheduler=small_steps(decode_steps=32))
    recorder = Recorder(world)
    world.add(make_request(0, PROMPT, 65))
    world.run()
    assert [grant.steps for grant in recorder.of(Phase.DECODE)] == [32, 32]


def test_a_sequence_that_can_join_does_not_wait_for_the_end_of_a_long_grant() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=400, scheduler=small_steps(decode_steps=1000))
    recorder = Recorder(world)
    world.add(make_request(0, PROMPT, 500))
    while len(world.outputs[RequestId(0)]) < 5:
        world.step()
        world.executor.advance()
    world.add(make_request(1, PROMPT, 20))
    while len(world.outputs[RequestId(1)]) < 3:
        world.step()
        world.executor.advance()
    assert len(world.outputs[RequestId(0)]) < 30
    assert [len(grant.rows) for grant in recorder.of(Phase.DECODE)] == [1, 2]
    world.run()


def test_turns_are_short_where_more_sequences_decode_than_there_are_rows() -> None:
    config = small_steps(decode_steps=1000, turn_steps=3, max_batch_rows=2)
    world = make_world([SPEC], page_bytes=PAGE, pages=400, scheduler=config)
    recorder = Recorder(world)
    for number in range(3):
        world.add(make_request(number, PROMPT, 60))
    while not all(world.outputs.values()):
        world.step()
        world.executor.advance()
    before = len(recorder.of(Phase.DECODE))
    while min(map(len, world.outputs.values())) < 20:
        world.step()
        world.executor.advance()
    assert max(map(len, world.outputs.values())) < 40
    assert {grant.steps for grant in recorder.of(Phase.DECODE)[before + 1 :]} == {3}


def test_who_stalls_for_pages_recalls_the_grants_that_may_have_to_give_them_up() -> None:
    world = make_world([SPEC] * 3, page_bytes=PAGE, pages=12, scheduler=small_steps(decode_steps=40))
    recorder = Recorder(world)
    recalled: list[GrantId] = []
    world.executor.recall = recalled.append  # type: ignore[method-assign]
    for number in range(3):
        world.add(make_request(number, PROMPT, 100, model=number))
    world.run()
    late = {grant.id for grant in recorder.of(Phase.DECODE) if grant.model > 0}
    assert recalled and set(recalled) <= late, "who is due first gives nothing up"
    assert len(recalled) == len(set(recalled))
    assert world.engine.stats().models[1].preemptions > 0


def test_a_short_prompt_does_not_wait_for_a_long_one_that_came_before_it() -> None:
    """Of another model, and of the same: the long one's own time is part of its deadline."""
    config = small_steps(ttft_target=5 * MILLISECOND)
    world = make_world([SPEC, SPEC], page_bytes=PAGE, pages=800, scheduler=config)
    world.add(make_request(0, tuple(range(100)) * 35, 1))
    for _ in range(20):
        world.step()
        world.executor.advance()
    for number, model in ((1, 0), (2, 1)):
        world.add(make_request(number, PROMPT, 1, model=model))
    world.run()
    first = [world.token_times[RequestId(number)][0] for number in range(3)]
    assert max(first[1:]) < first[0] // 4


def test_a_prompt_that_is_hopelessly_late_does_not_make_others_late() -> None:
    """The machine is a hundred times as slow as the cost model thinks, so the long prompt's deadline is over
    long before its end."""
    config = small_steps(ttft_target=20 * MILLISECOND)
    world = make_world([SPEC, SPEC], page_bytes=PAGE, pages=800, scheduler=config, speed=lambda: 100.0)
    long = make_request(0, tuple(range(100)) * 35, 1)
    world.add(long)
    while world.clock.now() < 200 * MILLISECOND:
        world.step()
        world.executor.advance()
    assert not world.outputs[RequestId(0)]
    world.add(make_request(1, PROMPT, 1, model=1))
    asked = world.clock.now()
    world.run()
    first = [world.token_times[RequestId(number)][0] - asked for number in range(2)]
    assert first[1] < 60 * MILLISECOND < first[0]
