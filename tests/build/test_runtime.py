"""The real engine, built from checkpoints: what loads, what fails alone, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, LlamaConfig, MistralConfig

from crosspool.backends.cpu import CpuBackend
from crosspool.build import runtime
from crosspool.build.runtime import build_engine
from crosspool.core.config import EngineConfig, Kernels, Mode, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.errors import ConfigError, ModelLoadError, ModelUnavailableError, OutOfMemoryError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.info import LoadProgress, Residency
from crosspool.core.request import FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.core.topology import Sharding
from crosspool.engine.engine import Engine
from crosspool.models.checkpoint import Checkpoint
from crosspool.models.loader import load_attention_side, load_ffn
from crosspool.models.registry import read_spec
from helpers_model_configs import CONFIGS
from helpers_models import PagedModel, random_model, save_model

pytestmark = pytest.mark.integration

POOL = 1 << 21
TWO = {"kv_devices": ("cpu:0", "cpu:1"), "weights_devices": ("cpu:0", "cpu:1")}
PROMPTS = [[5, 17, 3], list(range(1, 40)), [9] * 70]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    common = {"vocab_size": 97, "num_attention_heads": 3, "max_position_embeddings": 512}
    configs = {
        "latent": DeepseekV2Config(
            hidden_size=48,
            intermediate_size=40,
            moe_intermediate_size=16,
            num_hidden_layers=4,
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
            **common,
        ),
        "windowed": MistralConfig(
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=2,
            num_key_value_heads=1,
            head_dim=12,
            sliding_window=24,
            **common,
        ),
        "dense": LlamaConfig(
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=3,
            num_key_value_heads=1,
            head_dim=12,
            **common,
        ),
    }
    return {
        name: save_model(random_model(config, seed), tmp_path_factory.mktemp(name))
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, list[list[int]]]:
    """Greedy tokens of each model and prompt, one sequence at a time and without an engine."""

    def greedy(folder: Path, prompt: list[int]) -> list[int]:
        model = PagedModel(folder)
        first = int(model.prefill("it", prompt)[-1].argmax())
        return model.greedy("it", first, 12)[0]

    return {name: [greedy(folder, prompt) for prompt in PROMPTS] for name, folder in folders.items()}


def config_of(folders: dict[str, Path], pools: PoolConfig | None = None, **how) -> EngineConfig:
    models = tuple(ModelConfig(name, str(folder), pinned=name == "dense") for name, folder in folders.items())
    return EngineConfig(models, pools or PoolConfig(kv_pool_bytes=POOL), **{"threads": 1, **how})


@pytest.fixture
def build():
    """build_engine, whose engines are closed at the end and leave no thread behind."""
    engines: list[Engine] = []
    before = set(threading.enumerate())

    def make(*args, **how) -> Engine:
        engines.append(build_engine(*args, **how))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert set(threading.enumerate()) <= before


def request(number: int, model: int, prompt: list[int], params: SamplingParams) -> Request:
    return Request(
        RequestId(number),
        ModelIndex(model),
        tuple(prompt),
        params,
        params.max_tokens,
        seed=number,
        stop_token_ids=frozenset(),
        arrival=Nanoseconds(0),
    )


def serve(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """The outputs of all requests, served at once."""
    outputs: dict[int, list[int]] = {request.id: [] for request in requests}
    for item in requests:
        engine.add(item)
    while engine.has_work():
        for output in engine.step():
            assert output.finish_reason in (None, FinishReason.LENGTH)
            outputs[output.request] += output.token_ids
        engine.wait(0.05)
    engine.check()
    return list(outputs.values())


def generate(engine: Engine, names: list[str]) -> dict[str, list[list[int]]]:
    """Greedy outputs of every prompt on every one of these models, all at once."""
    params = SamplingParams(temperature=0, max_tokens=12)
    models = [engine.info.model(name).index for name in names]
    requests = [
        request(model * 10 + number, model, prompt, params)
        for model in models
        for number, prompt in enumerate(PROMPTS)
    ]
    outputs = iter(serve(engine, requests))
    return {name: [next(outputs) for _ in PROMPTS] for name in names}


@pytest.mark.parametrize(
    "placement",
    [
        {},
        {"weights_devices": ("cpu:1",)},
        {
            "kv_devices": ("cpu:0", "cpu:1"),
            "weights_devices": ("cpu:2", "cpu:3", "cpu:4"),
            "sharding": Sharding.TENSOR,
        },
        {"weights_devices": ("cpu:1", "cpu:2", "cpu:3", "cpu:4")},
        {**TWO, "mode": Mode.MONOLITHIC},
        {**TWO, "mode": Mode.MONOLITHIC, "kernels": Kernels.REFERENCE},
        {**TWO, "mode": Mode.MONOLITHIC, "sharding": Sharding.TENSOR},
    ],
    ids=[
        "one device",
        "two devices",
        "two KV, three weights by tensor",
        "four weights by layer",
        "whole models",
        "whole models, reference",
        "parts of all models",
    ],
)
def test_every_model_serves_on_every_placement(build, folders, expected, placement):
    engine = build(config_of(folders, scheduler=SchedulerConfig(chunk_quantum=16), **placement))
    assert generate(engine, list(folders)) == expected
    stats = engine.stats()
    assert stats.kv_pages_held == 0 < stats.kv_pages_total


@pytest.mark.parametrize(
    "placement", [{}, {"weights_devices": ("cpu:1",)}], ids=["one device", "two devices"]
)
def test_preemption_changes_no_token_greedy_or_drawn(build, folders, placement):
    """With room for a few sequences only, the others lose their pages and compute them again."""
    greedy = SamplingParams(temperature=0, max_tokens=90)
    drawn = SamplingParams(temperature=0.9, top_p=0.95, frequency_penalty=0.3, max_tokens=90)
    requests = [
        request(number, number % len(folders), PROMPTS[number % 2], drawn if number % 2 else greedy)
        for number in range(12)
    ]
    outputs = []
    for pages in (1000, 14):
        pools = PoolConfig(kv_pool_bytes=pages * 8192, page_bytes=8192)
        scheduler = SchedulerConfig(chunk_quantum=16, max_chunk_tokens=64, outgrowth_risk=1.0)
        engine = build(config_of(folders, pools, scheduler=scheduler, **placement))
        outputs.append(serve(engine, requests))
        preempted = sum(model.preemptions for model in engine.stats().models)
        assert (preempted > 0) == (pages == 14)
    assert outputs[0] == outputs[1]


def test_the_engine_says_what_it_holds(build, folders):
    engine = build(config_of(folders))
    info = engine.info
    assert [model.name for model in info.models] == list(folders)
    for model in info.models:
        spec, checkpoint = read_spec(model.path), Checkpoint(model.path)
        assert model.error is None and model.architecture == spec.architecture
        assert model.attention_bytes == load_attention_side(spec, checkpoint).bytes
        assert model.ffn_bytes == sum(
            load_ffn(spec, checkpoint, layer).bytes for layer in range(spec.num_layers)
        )
        assert model.residency is (Residency.PINNED if model.name == "dense" else Residency.RESIDENT)
    assert info.weights_used_bytes == info.weights_pool_bytes == sum(model.ffn_bytes for model in info.models)
    assert info.kv_pool_bytes == info.kv_pages * info.page_bytes <= POOL


@pytest.mark.parametrize("name", ["glm-query-latent", "llama-tied-llama3"])
def test_sizes_are_exact_in_another_dtype_too(build, tmp_path, name):
    """A selection bias stays float32 in a bfloat16 model."""
    folder = save_model(random_model(CONFIGS[name]()), tmp_path)
    engine = build(
        EngineConfig((ModelConfig("it", str(folder), "bfloat16"),), PoolConfig(kv_pool_bytes=POOL), threads=1)
    )
    (model,) = engine.info.models
    spec, checkpoint = read_spec(folder, "bfloat16"), Checkpoint(folder)
    assert model.attention_bytes == load_attention_side(spec, checkpoint).bytes
    assert model.ffn_bytes == sum(load_ffn(spec, checkpoint, layer).bytes for layer in range(spec.num_layers))


def test_progress_counts_the_bytes_of_every_model(build, folders):
    seen: list[LoadProgress] = []
    engine = build(config_of(folders), progress=seen.append)
    for model in engine.info.models:
        steps = [item for item in seen if item.model == model.name]
        done = [item.done_bytes for item in steps]
        assert done[0] == 0 and done == sorted(set(done)) and len(done) > 2
        assert {item.total_bytes for item in steps} == {done[-1]} == {model.attention_bytes + model.ffn_bytes}


def broken(kind: str, source: Path, folder: Path) -> Path:
    if kind == "missing":
        return folder / "nowhere"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if kind == "no architectures":
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "another width":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 51}))
    elif kind == "absurd width":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 2**31 - 1}))
    elif kind == "more heads than width":
        config = json.loads((folder / "config.json").read_text())
        del config["head_dim"]
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 1}))
    elif kind == "no number":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(
            re.sub(r'"rms_norm_eps": [^,]*', f'"rms_norm_eps": 1{"0" * 400}', text)
        )
    return folder


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "nowhere"),
        ("no architectures", "names no architectures"),
        ("truncated", "model.safetensors"),
        ("another width", "mlp.gate_proj.weight has shape"),
        ("more heads than width", "leaves"),
        ("absurd width", "mlp.gate_proj.weight has shape"),
        ("no number", "rms_norm_eps must be a number above 0"),
    ],
)
def test_a_model_that_cannot_be_loaded_fails_alone(build, folders, expected, tmp_path, caplog, kind, reason):
    zoo = {"bad": broken(kind, folders["dense"], tmp_path), "latent": folders["latent"]}
    seen: list[LoadProgress] = []
    engine = build(config_of(zoo), progress=seen.append)
    bad = engine.info.model("bad")
    assert reason in bad.error
    assert [item.error for item in seen if item.model == "bad"][-1] == bad.error
    assert engine.info.weights_used_bytes == engine.info.model("latent").ffn_bytes
    assert generate(engine, ["latent"])["latent"] == expected["latent"]
    assert str(tmp_path) not in bad.error
    assert str(tmp_path) in caplog.text
    with pytest.raises(ModelUnavailableError, match="bad does not serve"):
        engine.add(request(1, bad.index, [1], SamplingParams()))


def test_no_model_at_all_names_every_reason(folders, tmp_path):
    zoo = {
        "one": broken("truncated", folders["dense"], tmp_path / "one"),
        "two": broken("another width", folders["dense"], tmp_path / "two"),
    }
    with pytest.raises(ModelLoadError, match=r"no model could be loaded: one: .*; two: .*gate_proj"):
        build_engine(config_of(zoo))


@pytest.mark.parametrize("kernels", Kernels)
def test_a_failure_halfway_leaves_nothing_behind(build, folders, expected, monkeypatch, caplog, kernels):
    """The third FFN of one model cannot be read; nothing of it stays in the pool or in the tables."""

    def fails(spec, checkpoint, layer):
        if spec.architecture == "DeepseekV2ForCausalLM" and layer == 2:
            raise RuntimeError("the disk is gone")
        return load_ffn(spec, checkpoint, layer)

    monkeypatch.setattr(runtime, "load_ffn", fails)
    engine = build(config_of(folders, weights_devices=("cpu:1", "cpu:2"), kernels=kernels))
    assert engine.info.model("latent").error == "loading failed: RuntimeError: the disk is gone"
    assert "the disk is gone" in caplog.text
    assert engine.info.model("latent").residency is Residency.COLD
    others = ["windowed", "dense"]
    assert engine.info.weights_used_bytes == sum(engine.info.model(name).ffn_bytes for name in others)
    loaded = {ModelIndex(1), ModelIndex(2)}
    if kernels is Kernels.COMPILED:
        assert set(engine._executor._models) == loaded
    else:
        for worker in engine._executor._ffn:
            assert {model for model, _ in worker._table._rows} == loaded
        assert set(engine._executor._attention[0]._sides) == loaded
    assert generate(engine, others) == {name: expected[name] for name in others}


def test_a_model_over_the_budget_is_refused_in_bytes(build, folders, expected):
    first = read_spec(folders["latent"]).total_ffn_bytes
    needed = read_spec(folders["windowed"]).total_ffn_bytes
    pools = PoolConfig(kv_pool_bytes=POOL, weights_pool_bytes=first + 7)
    seen: list[LoadProgress] = []
    engine = build(config_of(folders, pools), progress=seen.append)
    error = engine.info.model("windowed").error
    assert [item.error for item in seen if item.model == "windowed"] == [None, error]
    assert f"{needed:,} bytes needed, 7 bytes free, {first:,} bytes evictable" in error
    assert engine.info.weights_used_bytes == first
    assert generate(engine, ["latent"])["latent"] == expected["latent"]


def test_pools_beyond_the_memory_are_refused_in_bytes(folders):
    with pytest.raises(OutOfMemoryError, match=r"bytes needed, [\d,]+ bytes free") as error:
        build_engine(config_of(folders, PoolConfig(kv_pool_bytes=1 << 50)))
    assert error.value.needed > 1 << 50 > error.value.free > 0


def test_an_arena_that_cannot_be_allocated_is_an_error_in_bytes(folders, monkeypatch):
    """The memory looked free when the pools were planned."""
    monkeypatch.setattr(CpuBackend, "free_bytes", property(lambda self: 1 << 62))
    with pytest.raises(OutOfMemoryError, match="KV pages on cpu:0"):
        build_engine(config_of(folders, PoolConfig(kv_pool_bytes=1 << 60)))


def test_a_device_of_another_kind_is_refused(folders):
    with pytest.raises(ConfigError, match="devices of one kind are needed, not cpu:0, cuda:0"):
        build_engine(config_of(folders, weights_devices=("cuda:0",)))


def test_workers_stop_if_the_engine_cannot_be_assembled(folders, monkeypatch):
    def fails(*args):
        raise ConfigError("impossible")

    monkeypatch.setattr(runtime, "assemble", fails)
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="impossible"):
        build_engine(config_of(folders))
    assert set(threading.enumerate()) <= before
