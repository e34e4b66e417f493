"""The executor on tiny real models: the same tokens on every placement, and every way a grant can end."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, Qwen3MoeConfig

from crosspool.core.batch import Phase, RetiredEvent, TokenEvent
from crosspool.core.errors import InvariantError
from crosspool.core.request import FinishReason
from crosspool.core.sampling import SamplingParams
from crosspool.core.topology import Sharding
from helpers_models import PagedModel, random_model, save_model
from helpers_workers import TinyModel, rig

pytestmark = pytest.mark.backend

PROMPTS = [[5, 17, 3], list(range(1, 40)), [9], [60, 61, 62, 63, 64, 65, 66, 67]]
GQA, MLA = 0, 1
PLACEMENTS = {
    "one device": {},
    "two devices": {"weights_devices": ["cpu:1"]},
    "one KV, four weights, by layer": {"weights_devices": ["cpu:1", "cpu:2", "cpu:3", "cpu:4"]},
    "one KV, four weights, by tensor": {
        "weights_devices": ["cpu:1", "cpu:2", "cpu:3", "cpu:4"],
        "sharding": Sharding.TENSOR,
    },
    "two KV, two weights": {"kv_devices": ["cpu:0", "cpu:1"], "weights_devices": ["cpu:2", "cpu:3"]},
    "shared devices, by tensor": {
        "kv_devices": ["cpu:0", "cpu:1"],
        "weights_devices": ["cpu:1", "cpu:0"],
        "sharding": Sharding.TENSOR,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    gqa = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=14,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    mla = DeepseekV2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=512,
    )
    return [save_model(random_model(config), tmp_path_factory.mktemp("model")) for config in (gqa, mla)]


@pytest.fixture(scope="module")
def models(folders):
    return [TinyModel.load(folder) for folder in folders]


@pytest.fixture(scope="module")
def expected(folders):
    """Greedy tokens of each model and prompt, without executor: one sequence, layer after layer."""

    def greedy(folder, prompt, count=24):
        model = PagedModel(folder)
        first = int(model.prefill("it", prompt)[-1].argmax())
        return model.greedy("it", first, count)[0]

    return [[greedy(folder, prompt) for prompt in PROMPTS] for folder in folders]


# -- the same tokens everywhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", [GQA, MLA])
def test_every_placement_makes_the_same_tokens(models, expected, model, placement):
    with rig(*models, **PLACEMENTS[placement]) as it:
        devices = len(it.arenas)
        for device in range(devices):
            sequences = [it.sequence(prompt, 24, model=model, device=device) for prompt in PROMPTS]
            assert it.run(*sequences) == expected[model]
            for sequence in sequences:
                assert [event.finish for event in sequence.events] == [None] * 23 + [FinishReason.LENGTH]


@pytest.mark.parametrize("placement", ["one device", "two devices", "one KV, four weights, by tensor"])
def test_models_and_phases_interleave(models, expected, placement):
    """Both models, prefill beside decode, every micro-batch in flight at once."""
    with rig(*models, **PLACEMENTS[placement]) as it:
        early = [[it.sequence(prompt, 24, model=model) for prompt in PROMPTS[:2]] for model in (GQA, MLA)]
        it.finish(*[it.prefill(*pair) for pair in early])
        late = [[it.sequence(prompt, 24, model=model) for prompt in PROMPTS[2:]] for model in (GQA, MLA)]
        it.finish(*[it.decode(10, *pair) for pair in early], *[it.prefill(*pair) for pair in late])
        it.finish(*[it.decode(30, *pair) for pair in early], *[it.decode(30, *pair) for pair in late])
        for model in (GQA, MLA):
            assert [s.output for s in early[model] + late[model]] == expected[model]


def test_several_steps_in_a_grant_equal_single_steps(models):
    sampled = SamplingParams(temperature=0.9, top_p=0.9, frequency_penalty=0.4, max_tokens=None)
    outputs = []
    for steps in (1, 3, 20):
        with rig(*models) as it:
            sequences = [it.sequence(prompt, 20, params=sampled) for prompt in PROMPTS]
            outputs.append(it.run(*sequences, steps=steps))
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({tuple(output) for output in outputs[0]}) == len(PROMPTS)


def test_a_prompt_in_chunks_and_a_pass_over_known_output(models, expected):
    """A chunk that is not the last chooses nothing; what was made may be computed again."""
    with rig(*models) as it:
        one, two = it.sequence(PROMPTS[1], 24), it.sequence(PROMPTS[3], 24)
        for tokens in (16, 16):
            it.finish(it.grant(Phase.PREFILL, [(one, tokens, 0)]))
        assert one.output == []
        it.finish(it.grant(Phase.PREFILL, [(one, 7, 1), (two, 5, 0)]))
        assert one.output == expected[GQA][1][:1] and two.output == []
        two.output = expected[GQA][3][:6]
        it.finish(it.prefill(two))
        assert two.output == expected[GQA][3][:7]


def test_rows_of_a_batch_may_make_different_numbers_of_tokens(models, expected):
    with rig(*models) as it:
        sequences = [it.sequence(prompt, 24) for prompt in PROMPTS]
        it.finish(it.prefill(*sequences))
        gate = gated(it)
        gate.opened.set()
        steps = (1, 7, 3, 5)
        it.finish(it.grant(Phase.DECODE, [(s, 1, n) for s, n in zip(sequences, steps, strict=True)]))
        assert [len(s.output) for s in sequences] == [2, 8, 4, 6]
        assert [rows for _, layer, rows in gate.seen if layer == 0] == [4, 3, 3, 2, 2, 1, 1]
        assert all(e.finish is None for s in sequences for e in s.events)
        it.finish(it.decode(30, *sequences))
        assert [s.output for s in sequences] == expected[GQA]


# -- how tokens are chosen and rows end -------------------------------------------------------------------


def test_a_stop_token_ends_its_row_alone(models, expected):
    tokens = expected[GQA][1]
    stop = tokens[9]
    first = tokens.index(stop)
    with rig(*models) as it:
        stopping, other = it.sequence(PROMPTS[1], 24, stops=[stop]), it.sequence(PROMPTS[0], 24)
        it.finish(it.prefill(stopping, other))
        it.finish(it.decode(24, stopping, other))
        assert stopping.output == tokens[: first + 1]
        assert stopping.events[-1].finish is FinishReason.STOP
        assert other.output == expected[GQA][0]


def test_stop_on_the_last_token_allowed_is_a_stop(models, expected):
    stop = expected[GQA][0][0]
    with rig(*models) as it:
        sequence = it.sequence(PROMPTS[0], 1, stops=[stop])
        it.finish(it.prefill(sequence))
        assert [event.finish for event in sequence.events] == [FinishReason.STOP]


def test_min_tokens_suppress_stop_tokens(models, expected):
    stops = set(expected[GQA][0])
    params = SamplingParams(temperature=0, min_tokens=6, max_tokens=None)
    with rig(*models) as it:
        sequence = it.sequence(PROMPTS[0], 24, params=params, stops=[*stops, 10_000])
        it.run(sequence, steps=5)
        assert not stops & set(sequence.output[:6])
        assert len(sequence.output) >= 7 or sequence.events[-1].finish is FinishReason.LENGTH
        assert all(token in stops for token in sequence.output[6:7]) == (len(sequence.output) == 7)


def test_penalties_see_tokens_made_within_the_grant(models):
    """With the strongest frequency penalty a greedy sequence over 97 tokens does not soon repeat."""
    params = SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=2.0, max_tokens=None)
    outputs = []
    for steps in (1, 40):
        with rig(*models) as it:
            sequence = it.sequence(PROMPTS[0], 40, params=params)
            outputs.append(it.run(sequence, steps=steps)[0])
    assert outputs[0] == outputs[1]
    with rig(*models) as it:
        assert it.run(it.sequence(PROMPTS[0], 40))[0] != outputs[0]


def test_logprobs_come_with_tokens_only_if_asked_for(models, folders):
    params = SamplingParams(temperature=0, logprobs=3, max_tokens=None)
    with rig(*models) as it:
        asking, other = it.sequence(PROMPTS[0], 3, params=params), it.sequence(PROMPTS[0], 3)
        it.run(asking, other)
        assert all(event.logprobs is None for event in other.events)
    oracle = PagedModel(folders[GQA]).prefill("it", PROMPTS[0])[-1]
    first = asking.events[0].logprobs
    assert first.rank == 1 and first.top[0][0] == asking.output[0]
    assert [token for token, _ in first.top] == oracle.topk(3).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(oracle.topk(3).values.tolist(), abs=1e-4)
    assert first.logprob == pytest.approx(first.top[0][1])


def test_a_token_is_put_out_before_its_grant_ends(models):
    with rig(*models) as it:
        sequence = it.sequence(PROMPTS[0], 200)
        it.finish(it.prefill(sequence))
        it.decode(150, sequence)
        it.executor.wait(60)
        events = it.take()
        assert events and all(isinstance(event, TokenEvent) for event in events)


# -- cancelling, failing, closing -------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["one device", "one KV, four weights, by tensor"])
def test_a_cancelled_row_says_no_more_and_the_others_go_on(models, expected, placement):
    with rig(*models, **PLACEMENTS[placement]) as it:
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


def test_a_grant_whose_rows_are_all_cancelled_retires_early(models):
    with rig(*models) as it:
        sequence = it.sequence(PROMPTS[0], 450)
        it.finish(it.prefill(sequence))
        grant = it.decode(450, sequence)
        it.executor.cancel(sequence.id)
        it.finish(grant)
        assert len(sequence.output) < 450
        it.executor.cancel(sequence.id)  # unknown by now, and ignored


class Gate:
    """Stands before an FFN worker: holds its tasks until opened, and lets chosen ones fail.

    ``seen`` is (model, layer, tokens) of every task.
    """

    def __init__(self, worker) -> None:
        self.worker = worker
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.fails = lambda model, layer: False
        self.seen = []

    def ffn(self, model, layer, hidden):
        self.seen.append((model, layer, len(hidden)))
        self.reached.set()
        assert self.opened.wait(60)
        if self.fails(model, layer):
            raise RuntimeError("secret detail")
        return self.worker.ffn(model, layer, hidden)


def gated(it, device: int = 0) -> Gate:
    gate = Gate(it.executor._ffn[device])
    it.executor._ffn[device] = gate
    return gate


class HeadGate:
    """Stands before an attention worker: holds each head's tokens until opened."""

    def __init__(self, worker) -> None:
        self.attention, self.worker = worker.attention, worker
        self.opened = threading.Event()
        self.reached = threading.Event()

    def head(self, state):
        chosen = self.worker.head(state)
        self.reached.set()
        assert self.opened.wait(60)
        return chosen


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


def test_nan_logits_fail_the_micro_batch(models, caplog):
    with rig(*models) as it, caplog.at_level(logging.CRITICAL):
        sequence = it.sequence(PROMPTS[0], 4)
        it.finish(it.grant(Phase.PREFILL, [(sequence, 2, 0)]))
        for pages in sequence.pages:
            it.arenas[0][list(pages)] = 255  # not a number
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


def test_wait_ends_by_wake_by_an_event_or_by_time(models):
    with rig(*models) as it:
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


def test_an_idle_executor_costs_no_processor_time(models):
    with rig(*models, **PLACEMENTS["one KV, four weights, by layer"]) as it:
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
