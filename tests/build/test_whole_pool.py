"""One request may use every page of every KV device, and others live beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from crosspool.build.runtime import build_engine
from crosspool.core.config import EngineConfig, Kernels, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.errors import RequestTooLargeError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.engine.engine import Engine
from helpers_long_models import CONFIGS
from helpers_models import random_model, save_model

pytestmark = pytest.mark.integration

PAGE_BYTES = 8192
ONE = {"kv_devices": ("cpu:0",), "weights_devices": ("cpu:0",)}
TWO = {"kv_devices": ("cpu:0", "cpu:1"), "weights_devices": ("cpu:0", "cpu:1")}
REPORTING = SamplingParams(temperature=0, logprobs=3, max_tokens=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        name: save_model(random_model(config), tmp_path_factory.mktemp("model"))
        for name, config in CONFIGS.items()
    }


@pytest.fixture
def build(folders):
    """Engines over some of the models, with a KV pool of so many pages on all devices together."""
    engines: list[Engine] = []

    def make(names: Sequence[str], pages: int, devices: dict[str, tuple[str, ...]], **how) -> Engine:
        config = EngineConfig(
            tuple(ModelConfig(name, str(folders[name])) for name in names),
            PoolConfig(kv_pool_bytes=pages * PAGE_BYTES, page_bytes=PAGE_BYTES, prefix_cache=False),
            scheduler=SchedulerConfig(
                chunk_quantum=16, max_chunk_tokens=128, decode_steps=8, outgrowth_risk=1.0
            ),
            threads=1,
            **devices,
            **how,
        )
        engines.append(build_engine(config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def request(identity: int, tokens: int, most: int, model: int = 0) -> Request:
    prompt = tuple((identity + 7 * i + i * i // 5) % 97 for i in range(tokens))
    return Request(
        id=RequestId(identity),
        model=ModelIndex(model),
        prompt_token_ids=prompt,
        sampling=replace(REPORTING, max_tokens=most),
        max_tokens=most,
        seed=identity,
        stop_token_ids=frozenset(),
        arrival=Nanoseconds(0),
    )


class Told:
    """What an engine says of its requests."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine = engine
        self.outputs: dict[RequestId, list[object]] = {request.id: [] for request in requests}
        self.finished: dict[RequestId, FinishReason] = {}
        self.least_free = engine.stats().kv_pages_free
        for own in requests:
            engine.add(own)

    def steps(self) -> Iterator[None]:
        """Until everybody has ended and all pages are back."""
        while self.engine.has_work():
            self.engine.wait(10.0)
            for output in self.engine.step():
                self.outputs[output.request] += zip(output.token_ids, output.logprobs, strict=True)
                if output.finish_reason is not None:
                    self.finished[output.request] = output.finish_reason
            self.engine.check()
            self.least_free = min(self.least_free, self.engine.stats().kv_pages_free)
            yield

    def run(self) -> dict[RequestId, list[object]]:
        for _ in self.steps():
            pass
        return self.outputs


@pytest.mark.parametrize("name", ["gqa-1", "gqa-2", "gqa-3", "mla"])
@pytest.mark.parametrize("kernels", Kernels)
def test_a_request_uses_all_of_the_pool(build, name, kernels):
    """Whatever the number of key-value heads: less than a page of each layer group is left free. What comes
    out is what a single device makes of it."""
    pages = 25
    engine = build([name], pages, TWO, kernels=kernels)
    info = engine.info.models[0]
    usable = engine.stats().kv_pages_total
    longest = usable // info.layer_groups * info.tokens_per_page
    assert usable == 24 and info.max_pool_tokens == longest
    with pytest.raises(RequestTooLargeError, match=rf"KV pool's room for one request, which is {longest}"):
        engine.add(request(1, longest - 30, 31))
    told = Told(engine, [request(0, longest - 30, 30)])
    made = told.run()
    assert told.least_free < info.layer_groups
    assert engine.stats().kv_pages_free == usable
    if kernels is Kernels.COMPILED:
        assert made == Told(build([name], 200, ONE), [request(0, longest - 30, 30)]).run()


MODELS = ["gqa-2", "mla", "window"]
CROWD = [request(i, 20 + 30 * i, 90, i % len(MODELS)) for i in range(9)]


@pytest.fixture(scope="module")
def undisturbed(folders) -> dict[RequestId, list[object]]:
    """Of one device with room for everybody."""
    config = EngineConfig(
        tuple(ModelConfig(name, str(folders[name])) for name in MODELS),
        PoolConfig(kv_pool_bytes=2**23, page_bytes=PAGE_BYTES),
        threads=1,
    )
    engine = build_engine(config)
    try:
        return Told(engine, CROWD).run()
    finally:
        engine.close()


def spread_of(engine: Engine) -> set[RequestId]:
    """The requests that hold pages elsewhere now."""
    running = engine._scheduler._running
    return {s.request.id for s in running if s.table is not None and s.table.elsewhere}


def test_preemption_while_spread_changes_no_bit(build, undisturbed):
    engine = build(MODELS, 30, TWO)
    told, spread = Told(engine, CROWD), set()
    for _ in told.steps():
        spread |= spread_of(engine)
    assert told.outputs == undisturbed
    assert sum(model.preemptions for model in engine.stats().models) > 0 and len(spread) > 2
    assert engine.stats().kv_pages_free == engine.stats().kv_pages_total


def test_aborts_while_spread_give_every_page_back(build, undisturbed):
    """Whoever is seen with pages elsewhere in mid-decode is aborted, three of them; the others notice
    nothing."""
    engine = build(MODELS, 40, TWO)
    told, gone = Told(engine, CROWD), set()
    for _ in told.steps():
        for identity in spread_of(engine) - gone:
            if len(gone) < 3 and told.outputs[identity] and identity not in told.finished:
                engine.abort(identity)
                gone.add(identity)
    assert len(gone) == 3
    for identity, output in told.outputs.items():
        if identity in gone:
            assert told.finished[identity] is FinishReason.ABORT
            assert output == undisturbed[identity][: len(output)]
        else:
            assert output == undisturbed[identity]
    assert engine.stats().kv_pages_free == engine.stats().kv_pages_total
