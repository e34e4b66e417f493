"""A sequence whose pages lie on several KV devices has the bits of one that is whole at home."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crosspool.core.batch import Phase
from crosspool.core.errors import InvariantError
from crosspool.core.ids import KvDevice
from crosspool.core.sampling import SamplingParams
from crosspool.workers.resident import spread
from helpers_long_models import CONFIGS
from helpers_models import random_model, save_model
from helpers_workers import HandMade, TinyModel, rig

pytestmark = pytest.mark.backend

REPORTING = SamplingParams(temperature=0, logprobs=5, max_tokens=None)
PROMPT = [(7 * i + i * i // 5) % 97 for i in range(755)]
CHUNKS = (1, 63, 200, 250, 241)
SHORT = [5, 17, 3]
MADE = 40
"""The prompt fills three blocks but for 13 positions: decoding goes on into a fourth."""

TWO = {"kv_devices": ["cpu:0", "cpu:1"], "weights_devices": ["cpu:0", "cpu:1"]}
PLACEMENTS = {
    "shared devices": TWO,
    "shared devices, by tensor": {**TWO, "sharding": "tensor"},
    "separate weights": {"kv_devices": ["cpu:0", "cpu:1"], "weights_devices": ["cpu:2"]},
    "reversed": {"kv_devices": ["cpu:1", "cpu:0"], "weights_devices": ["cpu:0"]},
    "three": {"kv_devices": ["cpu:0", "cpu:1", "cpu:2"], "weights_devices": ["cpu:1", "cpu:3"]},
}
LENT = {
    "page by page": lambda chunk: chunk % 2,
    "spilled over": lambda chunk: int(chunk >= 9),
    "all elsewhere": lambda chunk: 1,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return {
        name: save_model(random_model(config), tmp_path_factory.mktemp("model"))
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def typed(request, saved) -> dict[str, TinyModel]:
    return {name: TinyModel.load(folder, request.param) for name, folder in saved.items()}


@pytest.fixture(scope="module")
def alone(typed) -> dict[str, list[object]]:
    """What a long and a short sequence report, all on one device."""

    def report(model: TinyModel) -> list[object]:
        with rig(model, resident=True) as it:
            both = [it.sequence(prompt, MADE, params=REPORTING) for prompt in (PROMPT, SHORT)]
            read_in_chunks(it, both[0])
            it.run(both[1], steps=MADE)
            it.finish(it.decode(MADE - 1, both[0]))
            return [reports(sequence) for sequence in both]

    return {name: report(model) for name, model in typed.items()}


def reports(sequence: HandMade) -> list[object]:
    return [(event.token, event.logprobs) for event in sequence.events]


def read_in_chunks(it, sequence: HandMade, neighbour: HandMade | None = None) -> None:
    """The long prompt, with the first token of it in the last chunk; the short one beside it in the last but
    one."""
    for number, tokens in enumerate(CHUNKS):
        rows = [(sequence, tokens, int(number == len(CHUNKS) - 1))]
        if neighbour is not None and number == len(CHUNKS) - 2:
            rows.append((neighbour, len(SHORT), 1))
        it.finish(it.grant(Phase.PREFILL, rows))


@pytest.mark.parametrize("lent", LENT)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bits_are_those_of_one_device(typed, alone, name, lent):
    """Prompt in chunks and decode, beside a neighbour that is whole at home; log-probabilities to the last
    bit."""
    with rig(typed[name], resident=True, **TWO) as it:
        far = it.sequence(PROMPT, MADE, lent=LENT[lent], params=REPORTING)
        near = it.sequence(SHORT, MADE, params=REPORTING)
        read_in_chunks(it, far, near)
        it.finish(it.decode(17, far, near))
        it.finish(it.decode(MADE, far, near))
        assert [reports(far), reports(near)] == alone[name]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["gqa-2", "mla"])
def test_on_every_placement_and_from_every_home(typed, alone, name, placement):
    """Two of them cross: each has its pages where the other is at home."""
    with rig(typed[name], resident=True, **PLACEMENTS[placement]) as it:
        devices = len(it.places.devices)
        both = [
            it.sequence(PROMPT, MADE, device=home, lent=lambda chunk: chunk % devices, params=REPORTING)
            for home in (0, devices - 1)
        ]
        for sequence in both:
            read_in_chunks(it, sequence)
        it.finish(*[it.decode(MADE - 1, sequence) for sequence in both])
        assert [reports(sequence) for sequence in both] == [alone[name][0]] * 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["gqa-3", "mla"])
def test_in_many_rounds(typed, alone, name, threads, monkeypatch):
    """As where a long prompt's states would take too much memory: a few queries at a time."""
    monkeypatch.setattr(spread, "KEPT_BYTES", 20_000)
    with rig(typed[name], resident=True, threads=threads, **TWO) as it:
        far, near = (
            it.sequence(p, MADE, lent=LENT["page by page"], params=REPORTING) for p in (PROMPT, SHORT)
        )
        read_in_chunks(it, far, near)
        it.finish(it.decode(MADE - 1, far, near))
        assert [reports(far), reports(near)] == alone[name]


@pytest.mark.parametrize("name", ["gqa-2", "mla"])
def test_the_reference_serves_them_too(typed, name):
    made = []
    for how in ({}, TWO):
        with rig(typed[name], resident=False, **how) as it:
            lent = LENT["page by page"] if how else None
            sequence = it.sequence(PROMPT[:300], 8, lent=lent)
            made += it.run(sequence)
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["gqa-2", "mla"])
def test_a_cancelled_row_leaves_and_the_others_go_on(typed, alone, name, resident):
    with rig(typed[name], resident=resident, **TWO) as it:
        far, gone = (
            it.sequence(p, MADE, lent=LENT["page by page"], params=REPORTING) for p in (PROMPT, SHORT)
        )
        read_in_chunks(it, far, gone)
        grant = it.decode(MADE - 1, far, gone)
        it.executor.wait(60)
        it.executor.cancel(gone.id)
        it.finish(grant)
        assert len(far.output) == MADE
        if resident:
            assert reports(far) == alone[name][0]


def test_a_page_where_the_grant_names_no_device_is_refused(typed):
    with rig(typed["gqa-2"], resident=True, **PLACEMENTS["three"]) as it:
        submit, grants = it.executor.submit, []
        it.executor.submit = grants.append
        it.grant(Phase.PREFILL, [(it.sequence(PROMPT, MADE, lent=LENT["all elsewhere"]), 64, 0)])
        with pytest.raises(
            InvariantError, match="request 0 has pages on a KV device that its grant does not"
        ):
            submit(replace(grants[0], elsewhere=(KvDevice(2),)))


def test_blocks_are_of_the_device_that_has_their_last_position(saved):
    """Pages of 42 positions: the third block ends on page 18, the fourth within the last one."""
    with rig(TinyModel.load(saved["gqa-2"], "bfloat16"), resident=True, **TWO) as it:
        model, teams = it.executor._models[0], (1, 0)
        assert model.layout.tokens_per_page == 42
        grants = []
        submit, it.executor.submit = it.executor.submit, grants.append
        sequence = it.sequence(PROMPT, MADE, lent=lambda chunk: int(chunk == 18), params=REPORTING)
        sequence.computed, sequence.output = len(PROMPT), [1]
        it.decode(MADE - 1, sequence)
        it.executor.submit = submit
        context = spread.spread_context(grants[0], model, it.places, teams)
        assert [[part.tolist() for part in group] for group in context.blocks[0]] == [[[2, 3], [0, 1]]]
        assert (context.parts, context.rounds, context.states, context.words) == (2, 1, 4, 6)
        assert spread.teams_of(grants[0], teams) == 3
