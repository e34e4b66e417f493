"""The executor on tiny real models: the same tokens on every placement, and how rows end."""

from __future__ import annotations

import pytest

from crosspool.core.batch import Phase, TokenEvent
from crosspool.core.request import FinishReason
from crosspool.core.sampling import SamplingParams
from helpers_models import PagedModel
from helpers_workers import GQA, MLA, PLACEMENTS, PROMPTS, gated, rig

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", [GQA, MLA])
def test_every_placement_makes_the_same_tokens(models, expected, model, placement, resident):
    with rig(*models, resident=resident, **PLACEMENTS[placement]) as it:
        devices = len(it.places.devices)
        for device in range(devices):
            sequences = [it.sequence(prompt, 24, model=model, device=device) for prompt in PROMPTS]
            assert it.run(*sequences) == expected[model]
            for sequence in sequences:
                assert [event.finish for event in sequence.events] == [None] * 23 + [FinishReason.LENGTH]


@pytest.mark.parametrize("placement", ["one device", "two devices", "one KV, four weights, by tensor"])
def test_models_and_phases_interleave(models, expected, placement, resident):
    """Both models, prefill beside decode, every micro-batch in flight at once."""
    with rig(*models, resident=resident, **PLACEMENTS[placement]) as it:
        early = [[it.sequence(prompt, 24, model=model) for prompt in PROMPTS[:2]] for model in (GQA, MLA)]
        it.finish(*[it.prefill(*pair) for pair in early])
        late = [[it.sequence(prompt, 24, model=model) for prompt in PROMPTS[2:]] for model in (GQA, MLA)]
        it.finish(*[it.decode(10, *pair) for pair in early], *[it.prefill(*pair) for pair in late])
        it.finish(*[it.decode(30, *pair) for pair in early], *[it.decode(30, *pair) for pair in late])
        for model in (GQA, MLA):
            assert [s.output for s in early[model] + late[model]] == expected[model]


def test_several_steps_in_a_grant_equal_single_steps(models, resident):
    sampled = SamplingParams(temperature=0.9, top_p=0.9, frequency_penalty=0.4, max_tokens=None)
    outputs = []
    for steps in (1, 3, 20):
        with rig(*models, resident=resident) as it:
            sequences = [it.sequence(prompt, 20, params=sampled) for prompt in PROMPTS]
            outputs.append(it.run(*sequences, steps=steps))
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({tuple(output) for output in outputs[0]}) == len(PROMPTS)


def test_a_prompt_in_chunks_and_a_pass_over_known_output(models, expected, resident):
    """A chunk that is not the last chooses nothing; what was made may be computed again."""
    with rig(*models, resident=resident) as it:
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


def test_a_stop_token_ends_its_row_alone(models, expected, resident):
    tokens = expected[GQA][1]
    stop = tokens[9]
    first = tokens.index(stop)
    with rig(*models, resident=resident) as it:
        stopping, other = it.sequence(PROMPTS[1], 24, stops=[stop]), it.sequence(PROMPTS[0], 24)
        it.finish(it.prefill(stopping, other))
        it.finish(it.decode(24, stopping, other))
        assert stopping.output == tokens[: first + 1]
        assert stopping.events[-1].finish is FinishReason.STOP
        assert other.output == expected[GQA][0]


def test_stop_on_the_last_token_allowed_is_a_stop(models, expected, resident):
    stop = expected[GQA][0][0]
    with rig(*models, resident=resident) as it:
        sequence = it.sequence(PROMPTS[0], 1, stops=[stop])
        it.finish(it.prefill(sequence))
        assert [event.finish for event in sequence.events] == [FinishReason.STOP]


def test_min_tokens_suppress_stop_tokens(models, expected, resident):
    stops = set(expected[GQA][0])
    params = SamplingParams(temperature=0, min_tokens=6, max_tokens=None)
    with rig(*models, resident=resident) as it:
        sequence = it.sequence(PROMPTS[0], 24, params=params, stops=[*stops, 10_000])
        it.run(sequence, steps=5)
        assert not stops & set(sequence.output[:6])
        assert len(sequence.output) >= 7 or sequence.events[-1].finish is FinishReason.LENGTH
        assert all(token in stops for token in sequence.output[6:7]) == (len(sequence.output) == 7)


def test_penalties_see_tokens_made_within_the_grant(models, resident):
    """With the strongest frequency penalty a greedy sequence over 97 tokens does not soon repeat."""
    params = SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=2.0, max_tokens=None)
    outputs = []
    for steps in (1, 40):
        with rig(*models, resident=resident) as it:
            sequence = it.sequence(PROMPTS[0], 40, params=params)
            outputs.append(it.run(sequence, steps=steps)[0])
    assert outputs[0] == outputs[1]
    with rig(*models, resident=resident) as it:
        assert it.run(it.sequence(PROMPTS[0], 40))[0] != outputs[0]


def test_logprobs_come_with_tokens_only_if_asked_for(models, folders, resident):
    params = SamplingParams(temperature=0, logprobs=3, max_tokens=None)
    with rig(*models, resident=resident) as it:
        asking, other = it.sequence(PROMPTS[0], 3, params=params), it.sequence(PROMPTS[0], 3)
        it.run(asking, other)
        assert all(event.logprobs is None for event in other.events)
    oracle = PagedModel(folders[GQA]).prefill("it", PROMPTS[0])[-1]
    first = asking.events[0].logprobs
    assert first.rank == 1 and first.top[0][0] == asking.output[0]
    assert [token for token, _ in first.top] == oracle.topk(3).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(oracle.topk(3).values.tolist(), abs=1e-4)
    assert first.logprob == pytest.approx(first.top[0][1])


def test_a_token_is_put_out_before_its_grant_ends(models, resident):
    with rig(*models, resident=resident) as it:
        sequence = it.sequence(PROMPTS[0], 200)
        it.finish(it.prefill(sequence))
        it.decode(150, sequence)
        it.executor.wait(60)
        events = it.take()
        assert events and all(isinstance(event, TokenEvent) for event in events)
