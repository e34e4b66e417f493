"""Engines of models whose FFNs are float8: stored so, or quantised while they load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, PreTrainedConfig, Qwen3MoeConfig

from crosspool.build import cuda
from crosspool.build.runtime import build_engine
from crosspool.core.config import EngineConfig, Kernels, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.errors import ConfigError, ModelLoadError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import Request, TokenLogprobs
from crosspool.core.sampling import SamplingParams
from crosspool.core.topology import Sharding
from crosspool.engine.engine import Engine
from crosspool.kernels.float8 import quantise_fp8
from crosspool.models.registry import read_spec
from helpers_devices import InterpretedDevice
from helpers_float8 import change_tensors, plain_of, save_float8
from helpers_models import PagedModel, random_model
from helpers_triton_gates import needs_interpreter

pytestmark = pytest.mark.integration

PROMPT, COUNT = [5, 17, 3, 44], 3
SMALL = SchedulerConfig(
    max_batch_rows=2, max_prefill_rows=2, chunk_quantum=16, max_chunk_tokens=16, max_running=4
)
TENSOR = {"weights_devices": ("cuda:0", "cuda:1"), "sharding": Sharding.TENSOR}

COMMON = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "hidden_size": 136,
    "intermediate_size": 300,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "whole blocks": lambda: Qwen3MoeConfig(
        **COMMON | {"hidden_size": 128, "intermediate_size": 256},
        moe_intermediate_size=256,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=3,
    ),
    "a dense layer": lambda: Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=200,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=3,
        mlp_only_layers=[0],
    ),
    "shared experts": lambda: DeepseekV2Config(
        **COMMON,
        moe_intermediate_size=140,
        num_key_value_heads=2,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=3,
        n_shared_experts=2,
        first_k_dense_replace=1,
    ),
}
"""Float8 matrices of these are of whole blocks, or of parts of blocks at both ends."""


class Card(InterpretedDevice):
    """A GPU with so much free memory, of which so much is taken."""

    free_bytes = 1 << 25

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.taken = 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = super().tensor(shape, dtype)
        self.taken += made.nbytes
        return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Of each config a float8 checkpoint, and one of the same weights in float32."""
    torch.set_num_threads(1)
    return {
        name: save_float8(random_model(config(), seed), tmp_path_factory.mktemp("models"))
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture
def cards() -> list[Card]:
    """Of all engines that are built."""
    return []


@pytest.fixture
def build(monkeypatch, cards) -> Iterator[Callable[..., Engine]]:
    def make_cards(names: Sequence[str]) -> tuple[Card, ...]:
        made = tuple(Card(name) for name in names)
        cards.extend(made)
        return made

    monkeypatch.setattr(cuda, "make_cuda_devices", make_cards)
    engines: list[Engine] = []

    def make(*folders: Path, weights_dtype: str = "auto", **how: object) -> Engine:
        """Models are called by numbers."""
        devices = {"kv_devices": ("cuda:0",), "weights_devices": ("cuda:0",), "scheduler": SMALL}
        models = tuple(
            ModelConfig(str(number), str(folder), weights_dtype=weights_dtype)
            for number, folder in enumerate(folders)
        )
        engines.append(build_engine(EngineConfig(models, **{**devices, **how})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def on_cpu(kernels: Kernels) -> dict[str, object]:
    devices = {"kv_devices": ("cpu:0",), "weights_devices": ("cpu:0",), "threads": 2}
    return devices | {"kernels": kernels, "pools": PoolConfig(kv_pool_bytes=1 << 21)}


def generate(engine: Engine, model: int = 0) -> tuple[list[int], list[TokenLogprobs]]:
    params = SamplingParams(temperature=0, max_tokens=COUNT, logprobs=20)
    nothing: frozenset[int] = frozenset()
    index, prompt = ModelIndex(model), tuple(PROMPT)
    engine.add(Request(RequestId(model), index, prompt, params, COUNT, 0, nothing, Nanoseconds(0)))
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
            logprobs += output.logprobs
        engine.wait(0.05)
    return tokens, logprobs


def assert_says(engine: Engine, folder: Path, index: int = 0) -> None:
    """A model what the reference says with the weights in this folder."""
    model = PagedModel(folder)
    logits = [model.prefill("it", PROMPT)[-1]]
    tokens, more = model.greedy("it", int(logits[0].argmax()), COUNT)
    said, logprobs = generate(engine, index)
    assert said == tokens
    for row, found in zip([*logits, *more[:-1]], logprobs, strict=True):
        ids = [token for token, _ in found.top]
        assert len(ids) == 20
        values = torch.tensor([value for _, value in found.top])
        torch.testing.assert_close(values, row[torch.tensor(ids)], atol=1e-4, rtol=1e-4)


@needs_interpreter
@pytest.mark.parametrize("placement", [{}, TENSOR], ids=["one device", "two, by tensor"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gpus_compute_with_the_stored_numbers_and_scales(folders, build, cards, monkeypatch, name, placement):
    """And their arenas are large enough, and hardly larger; and all is within what they have."""
    arenas = []
    make = cuda.WeightsArena

    def noting(device, size):
        arenas.append(make(device, size))
        return arenas[-1]

    monkeypatch.setattr(cuda, "WeightsArena", noting)
    float8, plain = folders[name]
    engine = build(float8, **placement)
    assert_says(engine, plain)
    spec = read_spec(float8)
    (model,) = engine.info.models
    assert (model.dtype, model.weights_dtype) == ("float32", "float8")
    assert model.ffn_bytes == spec.total_ffn_bytes < read_spec(plain).total_ffn_bytes / 3.5
    for arena in arenas:
        memory = arena.room._memory.numel()
        assert memory - cuda.bytes_between(spec) <= arena.room.used <= memory
    for card in cards:
        assert card.taken <= cuda.USABLE * card.free_bytes


@needs_interpreter
@pytest.mark.parametrize("name", ["a dense layer", "shared experts"])
def test_gpus_quantise_what_is_stored_otherwise(folders, build, tmp_path, name):
    _, plain = folders[name]

    def quantised(tensor: str, weight: torch.Tensor) -> torch.Tensor:
        is_ffn = ".mlp." in tensor and tensor.endswith("_proj.weight")
        return plain_of(*quantise_fp8(weight)) if is_ffn else weight

    wanted = change_tensors(plain, tmp_path, quantised)
    engine = build(plain, weights_dtype="float8")
    assert engine.info.models[0].weights_dtype == "float8"
    assert_says(engine, wanted)


@needs_interpreter
def test_an_ffn_of_which_a_part_is_stored_otherwise_is_of_the_models_dtype(build, tmp_path):
    kept = "model.layers.1.mlp.shared_experts"
    model = random_model(CONFIGS["shared experts"]())
    float8, plain = save_float8(model, tmp_path, kept=[kept])
    spec = read_spec(float8)
    assert [layer.ffn.float8 for layer in spec.layers] == [True, False]
    assert_says(build(float8), plain)


@needs_interpreter
def test_models_that_are_alike_but_for_float8_share_no_graphs(folders, build):
    float8, plain = folders["a dense layer"]
    engine = build(float8, plain)
    assert [model.weights_dtype for model in engine.info.models] == ["float8", "float32"]
    for index in (0, 1):
        assert_says(engine, plain, index)


@pytest.mark.parametrize("kernels", list(Kernels))
@pytest.mark.parametrize("name", ["a dense layer", "shared experts"])
def test_cpus_dequantise(build, tmp_path, name, kernels):
    """To the bits of a checkpoint that has the dequantised weights."""
    float8, plain = save_float8(random_model(CONFIGS[name]()).bfloat16(), tmp_path)
    engine, other = (build(folder, **on_cpu(kernels)) for folder in (float8, plain))
    assert generate(engine) == generate(other)
    (model,), (wanted,) = engine.info.models, other.info.models
    assert model.weights_dtype == "bfloat16"
    assert (model.attention_bytes, model.ffn_bytes) == (wanted.attention_bytes, wanted.ffn_bytes)
    assert engine.info.weights_pool_bytes == model.ffn_bytes


def test_cpus_quantise_it_to_int8(build, tmp_path):
    float8, plain = save_float8(random_model(CONFIGS["a dense layer"]()).bfloat16(), tmp_path)
    how = on_cpu(Kernels.COMPILED) | {"weights_dtype": "int8"}
    engine, other = (build(folder, **how) for folder in (float8, plain))
    assert generate(engine) == generate(other)
    assert engine.info.models[0].weights_dtype == "int8"
    assert engine.info.models[0].ffn_bytes == other.info.models[0].ffn_bytes


@pytest.mark.parametrize("kernels", list(Kernels))
def test_what_cannot_be_is_refused(folders, build, kernels):
    _, plain = folders["a dense layer"]
    with pytest.raises(ConfigError, match="model 0: weights_dtype float8 needs GPUs"):
        build(plain, weights_dtype="float8", **on_cpu(kernels))
    with pytest.raises(ConfigError, match="model 0: weights_dtype int8 needs CPU devices"):
        build(plain, weights_dtype="int8")


@needs_interpreter
def test_fewer_blocks_than_devices_are_refused(folders, build):
    float8, _ = folders["a dense layer"]
    three = TENSOR | {"weights_devices": ("cuda:0", "cuda:1", "cuda:2")}
    with pytest.raises(ConfigError, match=r"part 0 of 3 of a float8 FFN, .* of 200 columns is empty"):
        build(float8, **three)


@needs_interpreter
def test_what_is_not_finite_is_named(folders, build, tmp_path):
    _, plain = folders["a dense layer"]
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    bad = change_tensors(
        plain, tmp_path, lambda tensor, weight: weight * (float("inf") if tensor == name else 1)
    )
    with pytest.raises(ModelLoadError, match=rf"{name}: weights \[200, 136\] hold .* that are not finite"):
        build(bad, weights_dtype="float8")
