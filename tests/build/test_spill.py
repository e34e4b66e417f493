"""The real engine: who was spilled and came back makes the same tokens and log-probabilities, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import MistralConfig

from crosspool.build.runtime import build_engine
from crosspool.core.config import EngineConfig, Kernels, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.copies import Direction
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.engine.engine import Engine
from crosspool.scheduler.sequence import State
from helpers_long_models import CONFIGS
from helpers_models import random_model, save_model
from helpers_spill import Told, spill_always

pytestmark = pytest.mark.integration

PAGE_BYTES = {"float32": 2048, "bfloat16": 1024}
"""16 to 21 tokens of a layer."""
WINDOW = MistralConfig(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=12,
    sliding_window=60,
    max_position_embeddings=2048,
)
MODELS = {"gqa": CONFIGS["gqa-2"], "window": WINDOW, "mla": CONFIGS["mla"]}
DEVICES = {"one": ("cpu:0",), "two": ("cpu:0", "cpu:1")}
DRAWN = SamplingParams(temperature=0.8, logprobs=2, max_tokens=None)
MOST = 120


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        name: save_model(random_model(config), tmp_path_factory.mktemp("model"))
        for name, config in MODELS.items()
    }


def request(identity: int, prompt: int, *, alike: int = 0) -> Request:
    """The first ``alike`` tokens are those of any other."""
    tokens = tuple(((identity if i >= alike else 0) + 7 * i + i * i // 5) % 97 for i in range(prompt))
    return Request(
        id=RequestId(identity),
        model=ModelIndex(0),
        prompt_token_ids=tokens,
        sampling=replace(DRAWN, max_tokens=MOST),
        max_tokens=MOST,
        seed=identity,
        stop_token_ids=frozenset(),
        arrival=Nanoseconds(0),
    )


CROWD = [request(i, 20 + 5 * i) for i in range(4)]
ALIKE = [request(i, 150, alike=140) for i in range(4)]


@pytest.fixture
def build(folders) -> Iterator[object]:
    engines: list[Engine] = []

    def make(
        model: str, pages: int, spill_pages: int, devices: str = "one", dtype: str = "float32", **how
    ) -> Engine:
        """Copies are said to cost nothing: with a store, what is preempted is spilled."""
        page = PAGE_BYTES[dtype]
        config = EngineConfig(
            (ModelConfig(model, str(folders[model]), dtype),),
            PoolConfig(kv_pool_bytes=pages * page, page_bytes=page, spill_bytes=spill_pages * page),
            SchedulerConfig(chunk_quantum=16, max_chunk_tokens=64, decode_steps=8, outgrowth_risk=1.0),
            kv_devices=DEVICES[devices],
            weights_devices=DEVICES[devices],
            threads=1,
            **how,
        )
        engine = build_engine(config)
        spill_always(engine)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", PAGE_BYTES)
@pytest.mark.parametrize("devices", DEVICES)
def test_what_follows_a_spill_is_the_same_to_the_last_bit(build, model, dtype, devices):
    """Grouped queries, windows and latents in several layer groups, with pages on one device and on two. The
    pool has room for the longest alone."""
    roomy = build(model, 2000, 0, dtype=dtype)
    most = roomy._pool.pages_for(ModelIndex(0), 35 + MOST)
    told = Told(build(model, most + most % 2, 2000, devices, dtype), CROWD)
    assert told.run() == Told(roomy, CROWD).run()
    assert told.copied(Direction.IN)
    device_of = told.engine._pool.places.device_of
    assert {device_of(page) for copy in told.copies for page in copy.pages} == set(
        range(len(DEVICES[devices]))
    )


def test_who_shares_a_prompt_is_spilled_and_returns_without_disturbing_the_others(build):
    undisturbed = Told(build("gqa", 2000, 0), ALIKE).run()
    told = Told(build("gqa", 90, 2000), ALIKE)
    assert told.run() == undisturbed
    out, back = (sum(copy.size for copy in told.copied(direction)) for direction in Direction)
    assert 0 < back < out, "the prompt was still there"


def test_plain_torch_spills_too(build):
    undisturbed = Told(build("mla", 2000, 0, kernels=Kernels.REFERENCE), CROWD).run()
    told = Told(build("mla", 60, 2000, kernels=Kernels.REFERENCE), CROWD)
    tokens = {identity: [token for token, _ in made] for identity, made in told.run().items()}
    assert tokens == {identity: [token for token, _ in made] for identity, made in undisturbed.items()}
    assert told.copied(Direction.IN)


@pytest.mark.parametrize("state", [State.SPILLING, State.WAITING, State.RETURNING])
def test_a_client_that_leaves_while_its_pages_are_copied_or_in_the_store(build, state):
    undisturbed = Told(build("gqa", 2000, 0), CROWD).run()
    told, gone = Told(build("gqa", 60, 2000), CROWD), None
    for _ in told.steps():
        for sequence in list(told.engine._scheduler._sequences.values()):
            if gone is None and sequence.spilled is not None and sequence.state is state:
                gone = sequence.request.id
                told.engine.abort(gone)
                told.engine.check()
    assert gone is not None and told.finished[gone] is FinishReason.ABORT
    for identity, output in told.outputs.items():
        expected = undisturbed[identity]
        assert output == (expected[: len(output)] if identity == gone else expected)
    stats = told.engine.stats()
    assert stats.kv_pages_held == 0 and stats.spill_used_bytes == 0


def test_a_cell_closes_while_pages_are_copied(build):
    told = Told(build("gqa", 60, 2000), CROWD)
    for _ in told.steps():
        if told.copies:
            break
    assert told.copies
    told.engine.close()
