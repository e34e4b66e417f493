"""An engine on GPUs, which here are interpreted: built from checkpoints, it says what the models say; and
what GPUs cannot do, or have no memory for, is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from crosspool.build import cuda
from crosspool.build.cuda import CudaMachine
from crosspool.build.pool_plan import PoolPlan
from crosspool.build.runtime import build_engine
from crosspool.core.batch import Phase
from crosspool.core.config import (
    EngineConfig,
    Kernels,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    WeightsMemory,
)
from crosspool.core.copies import Direction
from crosspool.core.errors import ConfigError, OutOfMemoryError
from crosspool.core.ids import KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.core.info import LoadProgress
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.costs.copies import CopyCosts
from crosspool.engine.engine import Engine
from crosspool.models.registry import read_spec
from crosspool.workers.cuda.feeder import Feeder
from helpers_devices import InterpretedDevice
from helpers_models import PagedModel, random_model, save_model
from helpers_spill import Told, spill_always
from helpers_triton_gates import needs_interpreter

pytestmark = [pytest.mark.integration, needs_interpreter]

PROMPT, COUNT = [5, 17, 3, 44], 3
PAGE = 8192
TWO = {"kv_devices": ("cuda:0", "cuda:1"), "weights_devices": ("cuda:0", "cuda:1")}
SMALL = SchedulerConfig(
    max_batch_rows=2, max_prefill_rows=2, chunk_quantum=16, max_chunk_tokens=16, max_running=4
)


class Card(InterpretedDevice):
    """A GPU with so much free memory."""

    free_bytes = 1 << 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    common = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    configs = {
        "dense": LlamaConfig(**common),
        "mixture": MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **common),
    }
    return {
        name: save_model(random_model(config, seed), tmp_path_factory.mktemp(name))
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture
def cards(monkeypatch) -> None:
    def make(names: tuple[str, ...]) -> tuple[Card, ...]:
        return tuple(Card(name) for name in names)

    monkeypatch.setattr(cuda, "make_cuda_devices", make)


def config_of(folders, pools: PoolConfig | None = None, **how) -> EngineConfig:
    models = tuple(ModelConfig(name, str(folder)) for name, folder in folders.items())
    devices = {"kv_devices": ("cuda:0",), "weights_devices": ("cuda:0",)}
    return EngineConfig(models, pools or PoolConfig(), **{"scheduler": SMALL, **devices, **how})


@contextmanager
def built(config: EngineConfig) -> Iterator[Engine]:
    engine = build_engine(config)
    try:
        yield engine
    finally:
        engine.close()


def generate(engine: Engine, models: int, prompt: Sequence[int] = PROMPT) -> list[list[int]]:
    said: list[list[int]] = [[] for _ in range(models)]
    for model in range(models):
        params = SamplingParams(temperature=0, max_tokens=COUNT)
        engine.add(
            Request(
                RequestId(model),
                ModelIndex(model),
                tuple(prompt),
                params,
                COUNT,
                0,
                frozenset(),
                Nanoseconds(0),
            )
        )
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            said[output.request] += output.token_ids
        engine.wait(0.05)
    return said


@pytest.mark.parametrize(
    "placement",
    [{}, {"weights_devices": ("cuda:1",)}, {"weights_devices": ("cuda:0/1",)}],
    ids=["one device", "two devices", "two devices of one card"],
)
def test_an_engine_says_what_its_models_say(folders, cards, placement):
    wanted = []
    for folder in folders.values():
        model = PagedModel(folder)
        first = int(model.prefill("it", PROMPT)[-1].argmax())
        wanted.append(model.greedy("it", first, COUNT)[0])
    with built(config_of(folders, **placement)) as engine:
        assert generate(engine, 2) == wanted
        left = Card.free_bytes * cuda.USABLE / (2 if "/1" in str(placement) else 1)
        assert 0 < engine.info.kv_pool_bytes < left


def test_who_was_spilled_and_came_back_says_what_the_model_says(folders, cards):
    """Of four pages each of two requests has two, when the earlier one needs its third."""
    prompts = [[(7 * i + 5 * number) % 61 for i in range(length)] for number, length in enumerate((15, 16))]
    wanted, model, count = {}, PagedModel(folders["dense"]), 20
    for number, prompt in enumerate(prompts):
        first = int(model.prefill(str(number), prompt)[-1].argmax())
        wanted[RequestId(number)] = model.greedy(str(number), first, count)[0]
    pools = PoolConfig(kv_pool_bytes=2 * PAGE, page_bytes=PAGE // 2, spill_bytes=2 * PAGE)
    scheduler = replace(SMALL, decode_steps=2, outgrowth_risk=1.0, tbt_target=Nanoseconds(10**12))
    params = SamplingParams(temperature=0, logprobs=1, max_tokens=count)
    requests = [
        Request(RequestId(n), ModelIndex(0), tuple(prompt), params, count, 0, frozenset(), Nanoseconds(0))
        for n, prompt in enumerate(prompts)
    ]
    with built(config_of({"dense": folders["dense"]}, pools, scheduler=scheduler)) as engine:
        spill_always(engine)
        told = Told(engine, requests)
        said = {own: [token for token, _ in made] for own, made in told.run().items()}
        assert said == wanted
        out, back = (told.copied(direction) for direction in Direction)
        assert len(out) == len(back) > 0
        costs = engine._scheduler.spilling._costs
        assert all(ratio.samples > 0 for ratio in costs._ratios.values()), "bandwidths were not learnt"


def test_a_request_has_pages_on_two_devices(folders, cards, monkeypatch):
    """Each of them has room for one of its two pages."""
    grants, submit = [], Feeder.submit
    monkeypatch.setattr(Feeder, "submit", lambda self, grant: (grants.append(grant), submit(self, grant)))
    prompt = [(7 * i + i * i) % 61 for i in range(20)]
    model = PagedModel(folders["mixture"])
    wanted, _ = model.greedy("it", int(model.prefill("it", prompt)[-1].argmax()), COUNT)
    pools = PoolConfig(kv_pool_bytes=2 * 4096, page_bytes=4096, prefix_cache=False)
    with built(config_of({"mixture": folders["mixture"]}, pools, **TWO)) as engine:
        assert generate(engine, 1, prompt) == [wanted]
    assert {(g.phase, len(g.elsewhere)) for g in grants} >= {(Phase.PREFILL, 1), (Phase.DECODE, 1)}


def test_every_kv_device_has_what_homes_need(folders, cards):
    """Lanes and their parts on each, and the same weights of attention."""
    specs = {ModelIndex(0): read_spec(folders["dense"], "auto")}
    devices = [Card("cuda:0"), Card("cuda:1")]
    two = cuda.bytes_besides(config_of({"dense": folders["dense"]}, **TWO), specs, devices)
    one = cuda.bytes_besides(config_of({"dense": folders["dense"]}), specs, devices[:1])
    assert two[0] == two[1] > one[0]
    weights = cuda.weights_bytes(specs[ModelIndex(0)], config_of(folders, **TWO).topology, KvDevice(0))
    assert min(weights) > specs[ModelIndex(0)].attention_side_bytes


def test_what_gpus_cannot_do_is_refused(folders, cards):
    with pytest.raises(ConfigError, match="the reference kernels run on CPU devices only"):
        build_engine(config_of(folders, kernels=Kernels.REFERENCE))
    with pytest.raises(ConfigError, match="weights_memory huge is about CPU devices"):
        build_engine(config_of(folders, PoolConfig(weights_memory=WeightsMemory.HUGE)))
    with pytest.raises(ConfigError, match="devices of one kind are needed, not cuda:0, cpu:0"):
        build_engine(config_of(folders, weights_devices=("cpu:0",)))
    int8 = ModelConfig("int8", str(folders["dense"]), weights_dtype="int8")
    with pytest.raises(ConfigError, match="model int8: weights_dtype int8 needs CPU devices"):
        build_engine(EngineConfig((int8,), kv_devices=("cuda:0",), weights_devices=("cuda:0",)))


def test_what_does_not_fit_is_refused_in_bytes(folders, cards, monkeypatch):
    with pytest.raises(OutOfMemoryError, match="device_bytes of cuda:0") as error:
        build_engine(config_of(folders, PoolConfig(device_bytes=1 << 24)))
    assert error.value.needed == 1 << 24 > error.value.free > 0
    with pytest.raises(OutOfMemoryError, match="lanes and grants on cuda:0"):
        build_engine(config_of(folders, PoolConfig(device_bytes=1 << 16)))
    with pytest.raises(OutOfMemoryError, match="the pools do not fit"):
        build_engine(config_of(folders, PoolConfig(kv_pool_bytes=1 << 24)))


def planned(folders, pools: PoolConfig, free: int, monkeypatch) -> PoolPlan:
    """Where so much host memory is free."""
    monkeypatch.setattr(cuda, "free_bytes", lambda: free)
    config = config_of(folders, pools)
    specs = {ModelIndex(index): read_spec(model.path) for index, model in enumerate(config.models)}
    return CudaMachine(config).plan(specs)


def test_the_spill_store_is_in_host_memory_and_as_large_as_the_kv_pool(folders, cards, monkeypatch):
    pages = 16
    pool = PoolConfig(kv_pool_bytes=pages * PAGE, page_bytes=PAGE)

    def spill_pages(free: int, asked: int | None = None) -> int:
        return planned(folders, replace(pool, spill_bytes=asked), free, monkeypatch).spill_pages

    assert spill_pages(1 << 40) == pages
    assert [spill_pages(4 * left * PAGE) for left in (16, 15, 1, 0)] == [16, 15, 1, 0]
    asked = (0, PAGE - 1, 17 * PAGE, 100 * PAGE)
    assert [spill_pages(100 * PAGE, size) for size in asked] == [0, 0, 17, 100]
    with pytest.raises(OutOfMemoryError, match="a spill store in pinned host memory") as error:
        spill_pages(100 * PAGE, 101 * PAGE)
    assert (error.value.needed, error.value.free) == (101 * PAGE, 100 * PAGE)
    monkeypatch.setattr(cuda, "MOST_SPILL_BYTES", 3 * PAGE)
    assert (spill_pages(1 << 40), spill_pages(1 << 40, 9 * PAGE)) == (3, 9)


def test_a_store_that_cannot_be_pinned_is_refused_before_anything_is_loaded(folders, cards, monkeypatch):
    def pinned(self, shape, dtype):
        raise OutOfMemoryError("pinned", needed=torch.Size(shape).numel(), free=7)

    monkeypatch.setattr(Card, "pinned", pinned)
    loaded: list[LoadProgress] = []
    pools = PoolConfig(kv_pool_bytes=16 * PAGE, page_bytes=PAGE, spill_bytes=5 * PAGE)
    with pytest.raises(OutOfMemoryError, match="a spill store of 5 pages in pinned host memory") as error:
        build_engine(config_of(folders, pools), loaded.append)
    assert (error.value.needed, error.value.free, loaded) == (5 * PAGE, 7, [])


def test_copies_are_first_guessed_at_the_speed_of_a_link(folders, cards):
    costs = CopyCosts(CudaMachine(config_of(folders)).profile)
    for direction in Direction:
        assert costs.time(direction, 25 << 30) == pytest.approx(1.07e9, rel=0.01)


@pytest.mark.parametrize("kv_devices", [("cuda:0",), ("cuda:0", "cuda:1")], ids=["one KV device", "two"])
def test_arenas_are_large_enough_and_hardly_larger(folders, cards, monkeypatch, kv_devices):
    arenas = []
    make = cuda.WeightsArena

    def noting(device, size):
        arenas.append(make(device, size))
        return arenas[-1]

    monkeypatch.setattr(cuda, "WeightsArena", noting)
    with built(config_of(folders, kv_devices=kv_devices, weights_devices=("cuda:0", "cuda:1"))):
        for arena in arenas:
            memory = arena.room._memory.numel()
            between = 2 * 256 * (cuda.TENSORS_PER_LAYER * 3 + 2) + 8 * 32
            assert memory - between <= arena.room.used <= memory


@pytest.mark.skipif(torch.version.cuda is not None, reason="about a PyTorch without CUDA")
def test_without_cuda_the_error_says_so(folders):
    with pytest.raises(ConfigError, match=r"device cuda:0: this PyTorch \(.*\) is built without CUDA"):
        build_engine(config_of(folders))
