"""What the resident executor promises beyond the contract that tests/workers tests for both executors."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from crosspool.core.batch import Phase
from crosspool.core.errors import InvariantError
from crosspool.core.ids import PageId
from crosspool.core.sampling import SamplingParams
from crosspool.server.frames import FrameReader
from crosspool.workers.resident.control import RING_EVENTS
from helpers_workers import GQA, MLA, PLACEMENTS, PROMPTS, HandMade, TinyModel, rig

pytestmark = pytest.mark.backend

REPORTING = SamplingParams(temperature=0, logprobs=5, max_tokens=None)
LONG = [(7 * i) % 97 for i in range(300)]


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def typed(request, folders) -> list[TinyModel]:
    """The tiny models in each dtype."""
    return [TinyModel.load(folder, request.param) for folder in folders]


def reports(sequence: HandMade) -> list[object]:
    return [(event.token, event.logprobs) for event in sequence.events]


def alone(models: list[TinyModel], model: int, prompt: list[int], threads: int = 1) -> list[object]:
    with rig(*models, resident=True, threads=threads) as it:
        sequence = it.sequence(prompt, 12, model=model, params=REPORTING)
        it.run(sequence)
        return reports(sequence)


@pytest.mark.parametrize("model", [GQA, MLA])
def test_a_row_has_the_same_bits_in_any_company(typed, model):
    """Log-probabilities to the last bit: alone, in a batch, beside another model, however the prompt is cut,
    with two threads."""
    expected = [alone(typed, model, prompt) for prompt in (*PROMPTS, LONG)]
    assert alone(typed, model, LONG, threads=2) == expected[-1]
    with rig(*typed, resident=True, threads=2) as it:
        own = [it.sequence(prompt, 12, model=model, params=REPORTING) for prompt in (*PROMPTS, LONG)]
        others = [it.sequence(prompt, 60, model=1 - model) for prompt in PROMPTS]
        it.finish(it.prefill(*others))
        going = it.decode(59, *others)
        for begin in range(0, 256, 64):
            it.finish(it.grant(Phase.PREFILL, [(own[-1], 64, 0)] + [(own[1], 16, 0)] * (begin == 64)))
        it.finish(it.prefill(*own))
        it.finish(it.decode(11, *own), going)
        assert [reports(sequence) for sequence in own] == expected


@pytest.mark.parametrize("model", [GQA, MLA])
def test_tokens_computed_again_as_a_prompt_lead_to_the_same_bits(typed, model):
    """As after a preemption: what was decoded token by token is read again in one chunk."""
    with rig(*typed, resident=True) as it:
        first, again = (it.sequence(PROMPTS[1], 12, model=model, params=REPORTING) for _ in range(2))
        it.run(first)
        again.output = first.output[:7]
        it.finish(it.prefill(again))
        it.finish(it.decode(11, again))
        assert reports(again) == reports(first)[7:]


@pytest.mark.parametrize("placement", ["one device", "two devices", "one KV, four weights, by tensor"])
def test_a_recalled_grant_ends_at_a_step_and_can_be_continued(models, expected, placement):
    with rig(*models, resident=True, **PLACEMENTS[placement]) as it:
        sequence = it.sequence(PROMPTS[1], 400)
        it.finish(it.prefill(sequence))
        grant = it.decode(390, sequence)
        while len(sequence.output) < 3:
            it.executor.wait(60)
            it.take()
        it.executor.recall(grant)
        it.finish(grant)
        assert 3 <= len(sequence.output) < 380
        it.executor.recall(grant)  # over by now, and ignored
        it.finish(it.decode(30, sequence))
        assert sequence.output[:24] == expected[GQA][1]


@pytest.mark.parametrize("threads", [1, 2])
def test_returning_to_python_after_every_task_changes_nothing(models, expected, threads):
    with rig(*models, resident=True, threads=threads, tasks=1) as it:
        for model in (GQA, MLA):
            assert it.run(*[it.sequence(prompt, 24, model=model) for prompt in PROMPTS]) == expected[model]


def test_a_grant_beyond_the_scratch_is_refused_and_loses_nothing(models, expected):
    with rig(*models, resident=True) as it:
        sequence = it.sequence(PROMPTS[0], 24)
        many = it.sequence([1] * 513, 1)
        with pytest.raises(InvariantError, match=r"513 tokens in 1 rows; the scratch is for 512 in 32"):
            it.prefill(many)
        assert it.run(sequence) == [expected[GQA][0]]


@pytest.mark.parametrize("broken", ["missing", "given back"])
def test_pages_that_are_not_there_are_refused(models, broken):
    """A page id of -1 would be memory before the arena."""
    with rig(*models, resident=True) as it:
        sequence = it.sequence(PROMPTS[1], 40)
        it.finish(it.prefill(sequence))
        last = {"missing": (), "given back": (PageId(-1),)}[broken]
        sequence.pages = tuple((*pages[:-1], *last) for pages in sequence.pages)
        with pytest.raises(InvariantError, match=r"pages 0 to .* are needed"):
            it.decode(39, sequence)


def test_more_events_than_the_ring_holds_wait_for_whoever_reads_them(models, expected):
    with rig(*models, resident=True) as it:
        sequences = [it.sequence(PROMPTS[0], 1) for _ in range(24)]
        grants = [it.prefill(*sequences) for _ in range(200)]
        assert len(grants) * len(sequences) > RING_EVENTS
        it.finish(*grants)
        for sequence in sequences:
            assert sequence.output == expected[GQA][0][:1] * len(grants)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end; nobody waits at either."""
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


def piped(reading: int) -> list[tuple[int, int]]:
    """(request, token) of each record in the pipe."""
    return FrameReader().feed(os.read(reading, 2**20))


@pytest.mark.parametrize("placement", ["one device", "two devices"])
def test_tokens_go_into_the_pipe_but_for_the_last_and_those_with_log_probabilities(
    models, expected, pipe, placement
):
    reading, writing = pipe
    with rig(*models, resident=True, **PLACEMENTS[placement]) as it:
        it.executor.stream_to(writing)
        sequences = [it.sequence(prompt, 24) for prompt in PROMPTS]
        reporting = it.sequence(PROMPTS[0], 24, params=REPORTING)
        it.run(*sequences, reporting)
        records = piped(reading)
        for number, sequence in enumerate(sequences):
            own = [token for request, token in records if request == sequence.id]
            assert own == expected[GQA][number][:-1]
            assert [event.delivered for event in sequence.events] == [True] * 23 + [False]
        assert not any(event.delivered for event in reporting.events)
        assert len(records) == 23 * len(sequences)


def test_what_a_full_pipe_does_not_take_comes_as_events_and_in_order(models, pipe):
    """Until the grant is over, though there is room again: no token overtakes another."""
    reading, writing = pipe
    room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096) // 24
    with rig(*models, resident=True) as it:
        it.executor.stream_to(writing)
        sequence = it.sequence(PROMPTS[0], 400)
        it.finish(it.prefill(sequence))
        grant = it.decode(300, sequence)
        records = []
        while grant not in it.retired:
            it.executor.wait(60)
            it.take()
            if not all(event.delivered for event in sequence.events) and not records:
                records = piped(reading)
        it.finish(it.decode(50, sequence))
        late = [event.token for event in sequence.events if not event.delivered]
        again = piped(reading)
        assert room - 1 <= len(records) <= room
        assert len(records) + len(late) == 301
        assert len(again) == 50
        tokens = [*[token for _, token in records], *late, *[token for _, token in again]]
        assert tokens == sequence.output


def test_a_team_that_is_stuck_is_the_end_of_the_engine(typed):
    with rig(typed[GQA], resident=True) as it:
        it.executor._patience = -1
        with pytest.raises(InvariantError, match="a team has ended no task for 0 s; 0 grants are in flight"):
            it.executor.poll()
