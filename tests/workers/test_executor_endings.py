"""How grants end that do not run to their end: cancelled, failed, closed; and how the executor rests."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from crosspool.core.batch import Phase, RetiredEvent
from crosspool.core.errors import InvariantError
from crosspool.core.topology import Sharding
from helpers_workers import GQA, MLA, PLACEMENTS, PROMPTS, HeadGate, gated, rig

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("placement", ["one device", "one KV, four weights, by tensor"])
def test_a_cancelled_row_says_no_more_and_the_others_go_on(models, expected, placement, resident):
    with rig(*models, resident=resident, **PLACEMENTS[placement]) as it:
        cancelled, other = it.sequence(PROMPTS[0], 300), it.sequence(PROMPTS[1], 24)
        it.finish(it.prefill(cancelled, other))
        grant = it.decode(300, cancelled, other)
        while len(cancelled.output) < 3:
            it.executor.wait(60)
            it.take()
        it.executor.cancel(cancelled.id)
        it.take()
        said = len(cancelled.output)
        (retired,) = it.finish(grant)
        assert retired.error is None
        assert len(cancelled.output) == said < 300
        assert other.output == expected[GQA][1]


def test_a_grant_whose_rows_are_all_cancelled_retires_early(models, resident):
    with rig(*models, resident=resident) as it:
        sequence = it.sequence(PROMPTS[0], 450)
        it.finish(it.prefill(sequence))
        grant = it.decode(450, sequence)
        it.executor.cancel(sequence.id)
        it.finish(grant)
        assert len(sequence.output) < 450
        it.executor.cancel(sequence.id)  # unknown by now, and ignored


def test_a_row_cancelled_while_its_token_is_chosen_does_not_say_it(models, expected):
    with rig(*models) as it:
        gate = it.executor._attention[0] = HeadGate(it.executor._attention[0])
        cancelled, other = it.sequence(PROMPTS[0], 5), it.sequence(PROMPTS[1], 24)
        grant = it.prefill(cancelled, other)
        assert gate.reached.wait(60)
        it.executor.cancel(cancelled.id)
        gate.opened.set()
        it.finish(grant)
        assert cancelled.output == [] and other.output == expected[GQA][1][:1]


def test_cancelling_every_row_ends_a_grant_at_the_next_layer(models):
    with rig(*models, **PLACEMENTS["two devices"]) as it:
        gate = gated(it)
        sequence = it.sequence(PROMPTS[0], 5)
        grant = it.prefill(sequence)
        assert gate.reached.wait(60)
        it.executor.cancel(sequence.id)
        gate.opened.set()
        (retired,) = it.finish(grant)
        assert gate.seen == [(GQA, 0, 3)] and sequence.output == [] and retired.error is None


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_failing_layer_fails_its_micro_batch_alone(models, expected, placement, caplog):
    with rig(*models, **PLACEMENTS[placement]) as it, caplog.at_level(logging.CRITICAL):
        gate = gated(it)
        gate.fails = lambda model, layer: model == MLA
        gate.opened.set()
        failing, other = it.sequence(PROMPTS[1], 24, model=MLA), it.sequence(PROMPTS[1], 24, model=GQA)
        bad, good = it.finish(it.prefill(failing), it.prefill(other))
        assert "internal error" in bad.error and "secret" not in bad.error
        assert failing.output == [] and good.error is None
        it.finish(it.decode(30, other))
        assert other.output == expected[GQA][1]
        gate.fails = lambda model, layer: False
        again = it.sequence(PROMPTS[1], 24, model=MLA)
        assert it.run(again) == [expected[MLA][1]]


def test_a_failure_is_logged_with_its_traceback(models, caplog):
    with rig(*models) as it:
        gate = gated(it)
        gate.fails = lambda model, layer: layer == 1
        gate.opened.set()
        it.finish(it.prefill(it.sequence(PROMPTS[0], 2)))
    assert "FFN of layer 1 of model 0 failed" in caplog.text
    assert "secret detail" in caplog.text


TENSOR_PAIR = {"weights_devices": ["cpu:1", "cpu:2"], "sharding": Sharding.TENSOR}


def test_a_failed_grant_retires_only_when_nothing_of_it_runs(models, caplog):
    """Two devices share an FFN: one fails while the other is still at it."""
    with rig(*models, **TENSOR_PAIR) as it, caplog.at_level(logging.CRITICAL):
        failing, slow = gated(it, 0), gated(it, 1)
        failing.fails = lambda model, layer: True
        grant = it.prefill(it.sequence(PROMPTS[0], 2))
        assert failing.reached.wait(60) and slow.reached.wait(60)
        failing.opened.set()
        while not it.executor._states[grant].error:
            time.sleep(0.001)
        it.take()
        assert grant not in it.retired
        slow.opened.set()
        (failed,) = it.finish(grant)
        assert failed.error


def test_what_a_failed_grant_has_not_begun_does_not_begin(models, caplog):
    """Its part on a device that is busy with another micro-batch is dropped, and it retires at once."""
    with rig(*models, **TENSOR_PAIR) as it, caplog.at_level(logging.CRITICAL):
        failing, busy = gated(it, 0), gated(it, 1)
        failing.fails = lambda model, layer: model == MLA
        failing.opened.set()
        other = it.prefill(it.sequence(PROMPTS[0], 2, model=GQA))
        assert busy.reached.wait(60)
        (failed,) = it.finish(it.prefill(it.sequence(PROMPTS[0], 2, model=MLA)))
        assert failed.error
        busy.opened.set()
        it.finish(other)
        assert MLA not in {model for model, _, _ in busy.seen}


def test_nan_logits_fail_the_micro_batch(models, caplog, resident):
    with rig(*models, resident=resident) as it, caplog.at_level(logging.CRITICAL):
        sequence = it.sequence(PROMPTS[0], 4)
        it.finish(it.grant(Phase.PREFILL, [(sequence, 2, 0)]))
        for pages in sequence.pages:
            it.arena[list(pages)] = 255  # not a number
        (retired,) = it.finish(it.grant(Phase.PREFILL, [(sequence, 1, 1)]))
        assert retired.error and sequence.output == []


def test_measured_times_are_those_of_layer_tasks(models):
    with rig(*models, **PLACEMENTS["two devices"]) as it:
        gate = gated(it)
        grant = it.prefill(it.sequence(PROMPTS[0], 2))
        assert gate.reached.wait(60)
        time.sleep(0.05)
        gate.opened.set()
        (retired,) = it.finish(grant)
    attention, ffn = retired.layer_times
    assert 0 < attention < 10_000_000_000
    assert ffn >= 50_000_000 // models[GQA].spec.num_layers


def test_wait_ends_by_wake_by_an_event_or_by_time(models, resident):
    with rig(*models, resident=resident) as it:
        it.executor.wait(0.001)
        it.executor.wake()
        it.executor.wait(60)
        woken = threading.Event()

        def wake():
            woken.set()
            it.executor.wake()

        waker = threading.Timer(0.05, wake)
        waker.start()
        it.executor.wait(60)
        assert woken.is_set(), "an old wake ended a new wait"
        waker.join()
        sequence = it.sequence(PROMPTS[0], 1)
        it.prefill(sequence)
        events = []
        while not any(isinstance(event, RetiredEvent) for event in events):
            it.executor.wait(60)
            events += it.executor.poll()


def test_an_idle_executor_costs_no_processor_time(models, resident):
    with rig(*models, resident=resident, **PLACEMENTS["one KV, four weights, by layer"]) as it:
        it.run(it.sequence(PROMPTS[0], 4))
        workers = [thread.native_id for thread in it.executor._threads]
        assert len(workers) == 5
        sleeps: list[list[int]] = []
        for _ in range(20):
            sleeps.append([times_slept(worker) for worker in workers])
            if sleeps[-2:-1] == sleeps[-1:]:
                return  # nobody woke within the last pause
            time.sleep(0.2)
        pytest.fail(f"the workers never come to rest: {sleeps}")


def times_slept(thread: int) -> int:
    """How often a thread has given up its core to wait. One that sleeps on does not wake to do it again."""
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("voluntary_ctxt_switches")).split()[1])


def test_close_in_the_middle_drops_what_is_in_flight(models):
    with rig(*models, **PLACEMENTS["two devices"]) as it:
        sequence = it.sequence(PROMPTS[0], 450)
        it.finish(it.prefill(sequence))
        it.decode(450, sequence)
        it.executor.close()
        it.executor.close()
        it.executor.wait(60)
        it.take()
        assert len(sequence.output) < 450
        with pytest.raises(InvariantError, match="closed"):
            it.decode(1, sequence)


def test_a_dead_team_is_no_silent_hang(models, caplog):
    with rig(*models) as it, caplog.at_level(logging.CRITICAL):
        it.executor._in_flight.finish = None  # a bug
        it.prefill(it.sequence(PROMPTS[0], 2))
        it.executor.wait(60)
        with pytest.raises(InvariantError, match="worker thread has died"):
            it.executor.poll()
