"""The real engine: who was spilled and came back makes the same tokens and log-probabilities, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import MistralConfig

from crosspool.build.runtime import build_engine
from crosspool.core.config import EngineConfig, Kernels, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.copies import Direction, PageCopy
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.engine.engine import Engine
from crosspool.scheduler.sequence import State
from helpers_long_models import CONFIGS
from helpers_models import random_model, save_model

pytestmark = pytest.mark.integration

PAGE_BYTES = 8192
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


def request(identity: int, model: int, prompt: int, *, alike: int = 0) -> Request:
    """The first ``alike`` tokens are those of any other of the model."""
    tokens = tuple(((identity if i >= alike else 0) + 7 * i + i * i // 5) % 97 for i in range(prompt))
    return Request(
        id=RequestId(identity),
        model=ModelIndex(model),
        prompt_token_ids=tokens,
        sampling=replace(DRAWN, max_tokens=MOST),
        max_tokens=MOST,
        seed=identity,
        stop_token_ids=frozenset(),
        arrival=Nanoseconds(0),
    )


CROWD = [request(i, i % len(MODELS), 20 + 25 * (i // 3)) for i in range(9)]
ALIKE = [request(i, 0, 150, alike=140) for i in range(4)]


@pytest.fixture
def build(folders) -> Iterator[object]:
    engines: list[Engine] = []

    def make(pages: int, spill_pages: int, devices: str, *, dtype: str = "float32", **how) -> Engine:
        """Of all models. Copies are said to cost nothing: with a store, what is preempted is spilled."""
        pools = PoolConfig(
            kv_pool_bytes=pages * PAGE_BYTES,
            page_bytes=PAGE_BYTES,
            spill_bytes=spill_pages * PAGE_BYTES,
            prefix_cache=how.pop("prefix_cache", True),
        )
        config = EngineConfig(
            tuple(ModelConfig(name, str(folders[name]), dtype) for name in MODELS),
            pools,
            SchedulerConfig(chunk_quantum=16, max_chunk_tokens=64, decode_steps=8, outgrowth_risk=1.0),
            kv_devices=DEVICES[devices],
            weights_devices=DEVICES[devices],
            threads=1,
            **how,
        )
        engine = build_engine(config)
        engine._scheduler.spilling._costs.time = lambda direction, size: 0
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


class Told:
    """What an engine says of its requests, and which copies it makes."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine = engine
        self.outputs: dict[RequestId, list[object]] = {own.id: [] for own in requests}
        self.finished: dict[RequestId, FinishReason] = {}
        self.copies: list[PageCopy] = []
        copy = engine._executor.copy
        engine._executor.copy = lambda each: (self.copies.append(each), copy(each))[0]
        for own in requests:
            engine.add(own)

    def steps(self) -> Iterator[None]:
        while self.engine.has_work():
            self.engine.wait(10.0)
            for output in self.engine.step():
                self.outputs[output.request] += zip(output.token_ids, output.logprobs, strict=True)
                if output.finish_reason is not None:
                    self.finished[output.request] = output.finish_reason
            self.engine.check()
            yield

    def run(self) -> dict[RequestId, list[object]]:
        for _ in self.steps():
            pass
        stats = self.engine.stats()
        assert stats.kv_pages_held == 0 and stats.spill_used_bytes == 0
        return self.outputs

    def returned(self) -> set[ModelIndex]:
        """The models of which some sequence came back."""
        counted = self.engine._scheduler.spilling.sequences
        return {model for model, direction in counted if direction is Direction.IN}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", DEVICES)
def test_what_follows_a_spill_is_the_same_to_the_last_bit(build, dtype, devices):
    """Grouped queries, windows and latents, with pages on one device and on two."""
    undisturbed = Told(build(400, 0, "one", dtype=dtype), CROWD).run()
    told = Told(build(34, 400, devices, dtype=dtype), CROWD)
    elsewhere = False
    for _ in told.steps():
        running = told.engine._scheduler._running
        elsewhere |= any(s.table.elsewhere for s in running if s.state is State.SPILLING)
    assert told.outputs == undisturbed
    assert told.returned() == {0, 1, 2}
    assert elsewhere == (devices == "two")


def test_who_shares_a_prompt_is_spilled_and_returns_without_disturbing_the_others(build):
    undisturbed = Told(build(400, 0, "one"), ALIKE).run()
    told = Told(build(26, 400, "one"), ALIKE)
    assert told.run() == undisturbed
    out = [copy for copy in told.copies if copy.direction is Direction.OUT]
    back = [copy for copy in told.copies if copy.direction is Direction.IN]
    assert back and len(out) == len(back)
    assert sum(copy.size for copy in back) < sum(copy.size for copy in out), "the prompt was still there"


def test_plain_torch_spills_too(build):
    undisturbed = Told(build(400, 0, "one", kernels=Kernels.REFERENCE), CROWD[:6]).run()
    told = Told(build(26, 400, "one", kernels=Kernels.REFERENCE), CROWD[:6])
    assert {key: [t for t, _ in made] for key, made in told.run().items()} == {
        key: [t for t, _ in made] for key, made in undisturbed.items()
    }
    assert told.returned()


def test_clients_that_leave_while_spilled_or_while_copied(build):
    undisturbed = Told(build(400, 0, "one"), CROWD).run()
    told, gone = Told(build(30, 400, "one"), CROWD), {}
    for _ in told.steps():
        for identity in told.outputs.keys() - told.finished.keys():
            sequence = told.engine._scheduler.get(identity)
            if sequence is None or sequence.spilled is None or sequence.state in gone.values():
                continue
            gone[identity] = sequence.state
            told.engine.abort(identity)
            told.engine.check()
    assert State.SPILLING in gone.values() and len(gone) > 1
    for identity, output in told.outputs.items():
        expected = undisturbed[identity]
        assert output == (expected[: len(output)] if identity in gone else expected)
    stats = told.engine.stats()
    assert stats.kv_pages_held == 0 and stats.spill_used_bytes == 0


def test_a_cell_closes_while_pages_are_copied(build):
    engine = build(30, 400, "one")
    told = Told(engine, CROWD)
    for _ in told.steps():
        if told.copies:
            break
    engine.close()
