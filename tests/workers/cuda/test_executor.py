"""Tiny real models through the executor on interpreted devices: the reference's tokens."""

from __future__ import annotations

import os

import pytest
from transformers import MistralConfig

from crosspool.core.batch import Phase, RetiredEvent, TokenEvent
from crosspool.core.errors import InvariantError
from crosspool.core.ids import NULL_PAGE
from crosspool.core.request import FinishReason
from crosspool.core.sampling import SamplingParams
from crosspool.core.token_record import RECORD_WORDS, TOKEN_RECORD
from crosspool.core.topology import Sharding
from crosspool.workers.cuda.lane_pass import LanePass
from crosspool.workers.cuda.lanes import LOOP_PASSES
from helpers_cuda_rig import LIMITS, cuda_rig
from helpers_devices import InterpretedDevice
from helpers_models import PagedModel, random_model, save_model
from helpers_triton import INTERPRETED
from helpers_workers import GQA, MLA, PROMPTS, TinyModel

pytestmark = pytest.mark.backend

PLACEMENTS = {
    "one device": {},
    "two devices": {"weights_devices": ("cuda:1",)},
    "two devices of one card": {"weights_devices": ("cuda:0/1",)},
    "three, by tensor": {
        "weights_devices": ("cuda:0", "cuda:1", "cuda:2"),
        "sharding": Sharding.TENSOR,
    },
}
CUDA = {"kv_devices": ("cuda:0",), "weights_devices": ("cuda:0",)}


@pytest.mark.parametrize("model", [GQA, MLA])
@pytest.mark.parametrize(
    ("placement", "loops"), [("one device", True), ("one device", False), ("two devices", True)]
)
def test_tokens_are_the_references(models, expected, monkeypatch, model, placement, loops):
    """Two prompts read at once, one in two chunks, then decoded together over several grants."""
    monkeypatch.setattr(InterpretedDevice, "loops", loops)
    with cuda_rig(*models, **CUDA | PLACEMENTS[placement]) as it:
        short, other, long = (it.sequence(PROMPTS[i], 4, model=model) for i in (0, 2, 1))
        it.finish(it.prefill(short, other), it.grant(Phase.PREFILL, [(long, 20, 0)]))
        it.finish(it.prefill(long))
        it.finish(it.decode(2, short, other, long))
        it.finish(it.decode(9, short, other, long))
        for sequence, prompt in ((short, 0), (other, 2), (long, 1)):
            assert sequence.output == expected[model][prompt][:4]
            assert [event.finish for event in sequence.events] == [None] * 3 + [FinishReason.LENGTH]
        if INTERPRETED:
            assert it.devices[0].captured > 0 and it.devices[0].replayed > 0
            looped = loops and placement == "one device"
            assert it.devices[0].rounds == (3 if looped else 0)


@pytest.mark.parametrize("placement", ["two devices of one card", "three, by tensor"])
def test_other_placements_make_the_same_tokens(models, expected, placement):
    with cuda_rig(*models, **CUDA | PLACEMENTS[placement]) as it:
        sequences = [it.sequence(PROMPTS[0], 2, model=model) for model in (GQA, MLA)]
        assert [it.run(own)[0] for own in sequences] == [expected[model][0][:2] for model in (GQA, MLA)]


def test_states_cross_by_stores_and_flags(models, expected, monkeypatch):
    """Launched one by one: where each device would replay a graph, interpreted ones would wait for ever."""
    monkeypatch.setattr(InterpretedDevice, "reaching", True)
    monkeypatch.setattr(LanePass, "record", lambda self: None)
    with cuda_rig(*models, **CUDA | PLACEMENTS["three, by tensor"]) as it:
        assert it.run(it.sequence(PROMPTS[0], 3))[0] == expected[GQA][0][:3]


TWO_KV = {
    "apart": {"kv_devices": ("cuda:0", "cuda:1"), "weights_devices": ("cuda:2",)},
    "together": {"kv_devices": ("cuda:0", "cuda:1"), "weights_devices": ("cuda:0", "cuda:1")},
}
LENT = {
    "page by page": lambda chunk: chunk % 2,
    "all elsewhere": lambda chunk: 1,
    "its end": lambda chunk: int(chunk > 0),
}


@pytest.mark.parametrize(
    ("placement", "lent", "model"),
    [
        ("apart", "page by page", GQA),
        ("together", "all elsewhere", MLA),
        ("apart", "its end", MLA),
        ("together", "page by page", GQA),
    ],
)
def test_pages_on_two_devices(models, expected, placement, lent, model):
    """Beside a row that has all its pages at home; prompts in one chunk and in two, and decodes."""
    with cuda_rig(*models, **TWO_KV[placement]) as it:
        far = it.sequence(PROMPTS[1], 6, model=model, lent=LENT[lent])
        near = it.sequence(PROMPTS[0], 6, model=model)
        it.finish(it.grant(Phase.PREFILL, [(far, 20, 0)]))
        it.finish(it.prefill(far, near))
        it.finish(it.decode(5, far, near))
        assert far.output == expected[model][1][:6]
        assert near.output == expected[model][0][:6]


def test_windows_over_two_devices(tmp_path_factory):
    """What falls out of the window is of either device, and is given back."""
    config = MistralConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        sliding_window=50,
        max_position_embeddings=512,
    )
    folder = save_model(random_model(config), tmp_path_factory.mktemp("window"))
    prompt = [(5 * i + i * i // 3) % 97 for i in range(150)]
    oracle = PagedModel(folder)
    wanted, _ = oracle.greedy("it", int(oracle.prefill("it", prompt)[-1].argmax()), 4)
    with cuda_rig(TinyModel.load(folder), **TWO_KV["together"]) as it:
        tokens = it.models[0].layout.tokens_per_page
        far = it.sequence(prompt, 4, lent=lambda chunk: chunk % 2)
        assert len(far.pages[0]) >= 3
        for begin in (0, 60, 120):
            count = min(60, len(prompt) - begin)
            it.finish(it.grant(Phase.PREFILL, [(far, count, int(begin == 120))]))
            gone = max(0, far.computed - 50 + 1) // tokens
            far.pages = tuple((NULL_PAGE,) * gone + group[gone:] for group in far.pages)
        it.finish(it.decode(3, far))
        assert far.output == wanted


def test_a_stop_token_and_sampling_as_the_reference(models, expected):
    tokens = expected[GQA][0]
    stop = tokens[2]
    with cuda_rig(*models, **CUDA) as it:
        stopping = it.sequence(PROMPTS[0], 9, stops=[stop])
        it.finish(it.prefill(stopping))
        it.finish(it.decode(8, stopping))
        assert stopping.output == tokens[: tokens.index(stop) + 1]
        assert stopping.events[-1].finish is FinishReason.STOP


def test_sampled_tokens_are_those_of_the_reference_executor(models):
    from helpers_workers import rig

    params = SamplingParams(temperature=0.9, top_p=0.9, top_k=20, frequency_penalty=0.4, max_tokens=None)
    with rig(*models) as it:
        wanted = it.run(*(it.sequence(PROMPTS[i], 3, params=params) for i in (0, 2)))
    with cuda_rig(*models, **CUDA) as it:
        assert it.run(*(it.sequence(PROMPTS[i], 3, params=params) for i in (0, 2))) == wanted


def test_logprobs_come_with_tokens_only_if_asked_for(models, folders):
    params = SamplingParams(temperature=0, logprobs=3, max_tokens=None)
    with cuda_rig(*models, **CUDA) as it:
        asking, other = it.sequence(PROMPTS[0], 2, params=params), it.sequence(PROMPTS[2], 2)
        it.finish(it.prefill(asking, other))
        it.finish(it.decode(1, asking, other))
        assert all(event.logprobs is None for event in other.events)
    oracle = PagedModel(folders[GQA])
    rows = [oracle.prefill("it", PROMPTS[0])[-1], oracle.run({"it": asking.output[:1]})["it"][-1]]
    for event, row in zip(asking.events, rows, strict=True):
        assert event.logprobs.rank == 1 and event.logprobs.top[0][0] == event.token
        assert [token for token, _ in event.logprobs.top] == row.topk(3).indices.tolist()
        assert [value for _, value in event.logprobs.top] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )


def test_tokens_go_into_the_pipe_and_the_last_one_does_not(models, expected):
    read, write = os.pipe()
    os.set_blocking(write, False)
    with cuda_rig(*models, **CUDA) as it, os.fdopen(read, "rb", buffering=0) as pipe:
        it.executor.stream_to(write)
        sequence = it.sequence(PROMPTS[2], 3)
        it.run(sequence)
        os.close(write)
        words = memoryview(pipe.read()).cast("q").tolist()
    assert sequence.output == expected[GQA][2][:3]
    assert [event.delivered for event in sequence.events] == [True, True, False]
    assert words == [w for token in sequence.output[:2] for w in (TOKEN_RECORD, sequence.id, token)]
    assert len(words) == 2 * RECORD_WORDS


@pytest.mark.parametrize(("loops", "most"), [(False, 9), (True, 9 + 2 * LOOP_PASSES)])
def test_a_recalled_and_a_cancelled_grant_retire(models, expected, monkeypatch, loops, most):
    """A loop of an interpreted device hears of nothing until it has ended."""
    monkeypatch.setattr(InterpretedDevice, "loops", loops)
    with cuda_rig(*models, **CUDA) as it:
        recalled, cancelled = it.sequence(PROMPTS[0], 60), it.sequence(PROMPTS[2], 60)
        it.finish(it.prefill(recalled, cancelled))
        first, second = it.decode(59, recalled), it.decode(59, cancelled)
        it.executor.recall(first)
        it.executor.cancel(cancelled.id)
        ends = it.finish(first, second)
        assert [end.error for end in ends] == [None, None]
        made = len(recalled.output)
        assert 2 <= made < most and recalled.output[:20] == expected[GQA][0][: min(made, 20)]
        assert len(cancelled.output) < most


def test_logits_that_are_no_numbers_fail_their_grant_alone(models, expected, caplog):
    with cuda_rig(*models, **CUDA) as it:
        bad, good = it.sequence(PROMPTS[0], 3), it.sequence(PROMPTS[2], 3)
        it.finish(it.prefill(bad), it.prefill(good))
        first = bad.pages[0][0]
        it.arena[first] = 255
        broken, sound = it.finish(it.decode(2, bad), it.decode(2, good))
        assert "internal error" in broken.error and sound.error is None
        assert good.output == expected[GQA][2][:3] and len(bad.output) == 1
    assert "of which none is the largest" in caplog.text


def test_what_cannot_be_launched_fails_alone(models, expected, monkeypatch, caplog):
    def fails(self, layer):
        if self.geometry.spec.num_layers == models[MLA].spec.num_layers:
            raise RuntimeError("secret detail")
        return ffn(self, layer)

    ffn = LanePass.ffn
    with cuda_rig(*models, **CUDA) as it:
        monkeypatch.setattr(LanePass, "ffn", fails)
        failing, other = it.sequence(PROMPTS[0], 1, model=MLA), it.sequence(PROMPTS[0], 1)
        bad, good = it.finish(it.prefill(failing), it.prefill(other))
        assert "secret" not in bad.error and good.error is None
        assert failing.output == [] and other.output == expected[GQA][0][:1]
    assert "secret detail" in caplog.text


def test_grants_that_do_not_fit_are_refused(models):
    with cuda_rig(*models, **CUDA) as it:
        rows = [it.sequence([1], 5) for _ in range(LIMITS.decode_rows + 1)]
        with pytest.raises(InvariantError, match=r"has 5 tokens in 5 rows; lanes are for 4 in 4"):
            it.decode(1, *rows)
        it.executor.close()
        with pytest.raises(InvariantError, match="closed"):
            it.decode(1, rows[0])


def test_models_bound_to_a_device_have_no_pages_elsewhere(models):
    with cuda_rig(*models, **TWO_KV["together"], sharding=Sharding.MODEL) as it:
        with pytest.raises(InvariantError, match="KV device 1 has no attention side of model 0"):
            it.prefill(it.sequence(PROMPTS[1], 1, lent=lambda chunk: 1))
        with pytest.raises(InvariantError, match="KV device 1 has no attention side of model 0"):
            it.prefill(it.sequence(PROMPTS[1], 1, device=1))


def test_events_are_of_the_contract(models):
    with cuda_rig(*models, **CUDA) as it:
        sequence = it.sequence(PROMPTS[2], 3)
        it.run(sequence)
        times = [event.layer_times for event in it.retired.values()]
        assert all(isinstance(event, TokenEvent) for event in sequence.events)
        assert all(isinstance(event, RetiredEvent) for event in it.retired.values())
        assert all(attention > 0 and ffn > 0 for attention, ffn in times)


@pytest.mark.parametrize("reaching", [False, True])
def test_preparing_passes_computes_nothing(models, monkeypatch, reaching):
    """What is run to be compiled finds a grant that is over: no page is written, nothing is told, and no
    device waits for another."""
    monkeypatch.setattr(InterpretedDevice, "runs_first", True)
    monkeypatch.setattr(InterpretedDevice, "reaching", reaching)
    with cuda_rig(*models, **CUDA | PLACEMENTS["two devices"]) as it:
        assert bool((it.arena == 255).all())
        assert it.executor.poll() == []
        sequence = it.sequence(PROMPTS[2], 1)
        it.finish(it.prefill(sequence))
        assert len(sequence.output) == 1 and not bool((it.arena == 255).all())
