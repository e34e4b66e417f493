"""Weights that are not read where they were loaded: int8, and copies in huge pages."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from crosspool.backends.weights_memory import HugeArena
from crosspool.build import runtime
from crosspool.build.runtime import build_engine
from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, WeightsMemory
from crosspool.core.ids import Nanoseconds, RequestId
from crosspool.core.request import Request, TokenLogprobs
from crosspool.core.sampling import SamplingParams
from crosspool.core.topology import Sharding
from crosspool.engine.engine import Engine
from crosspool.models.loader import load_ffn
from crosspool.models.registry import read_spec
from helpers_model_configs import CONFIGS
from helpers_models import public_logprobs, random_model, save_model

pytestmark = pytest.mark.integration

NAMES = [
    "qwen3-moe-normalised",
    "qwen3-bias-tied",
    "mixtral-5-experts-top-1-tied",
    "deepseek-v2-query-latent-bias-tied",
    "glm-groups",
]
PROMPT = [(7 * i) % 97 for i in range(40)]
LENGTH = 6
TENSOR = {
    "kv_devices": ("cpu:0",),
    "weights_devices": ("cpu:1", "cpu:2", "cpu:3"),
    "sharding": Sharding.TENSOR,
}
NOT_QUANTISED = re.compile(r"norm|embed_tokens|kv_b_proj|\.gate\.weight|bias")


@pytest.fixture
def build() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(folder: Path, weights_dtype: str = "auto", memory: str = "mapped", **how: object) -> Engine:
        pools = PoolConfig(kv_pool_bytes=1 << 21, weights_memory=WeightsMemory(memory))
        model = ModelConfig("it", str(folder), how.pop("dtype", "auto"), weights_dtype)
        engines.append(build_engine(EngineConfig((model,), pools, **{"threads": 1, **how})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def generate(engine: Engine) -> tuple[list[int], list[TokenLogprobs]]:
    params = SamplingParams(temperature=0, max_tokens=LENGTH, logprobs=20)
    (model,) = engine.info.models
    engine.add(
        Request(
            RequestId(1), model.index, tuple(PROMPT), params, LENGTH, 1, frozenset(), arrival=Nanoseconds(0)
        )
    )
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
            logprobs += output.logprobs
        engine.wait(0.05)
    return tokens, logprobs


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with every large matrix rounded to 255 levels of its rows; its head is its own."""
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(head)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not NOT_QUANTISED.search(name):
                scales = weight.abs().amax(-1, keepdim=True) / 127
                weight.copy_((weight / scales).round() * scales)
    return model


@pytest.mark.parametrize("placement", [{}, TENSOR], ids=["one device", "three weights devices, by tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_int8_computes_with_the_quantised_weights(build, tmp_path, name, placement):
    """Against the public implementation with the same weights."""
    model = random_model(CONFIGS[name]())
    engine = build(save_model(model, tmp_path), "int8", **placement)
    plain = public_logprobs(model, PROMPT)
    tokens, logprobs = generate(engine)
    expected = public_logprobs(dequantised(model), PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert tokens == expected.argmax(-1).tolist()
    for row, found in zip(expected, logprobs, strict=True):
        ids = torch.tensor([token for token, _ in found.top])
        values = torch.tensor([value for _, value in found.top])
        assert len(ids) == 20
        torch.testing.assert_close(values, row[ids], atol=5e-5, rtol=5e-5)
    assert (plain[-1] - expected[0]).abs().max() > 1e-3, "quantising must have changed something"


@pytest.mark.parametrize("placement", [{}, TENSOR], ids=["one device", "three weights devices, by tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_give_the_same_bits(build, tmp_path, name, placement):
    folder = save_model(random_model(CONFIGS[name]()).bfloat16(), tmp_path)
    assert generate(build(folder, memory="huge", **placement)) == generate(build(folder, **placement))


@pytest.mark.parametrize("placement", [{}, TENSOR], ids=["one device", "three weights devices, by tensor"])
@pytest.mark.parametrize("weights_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_exact(build, tmp_path, monkeypatch, name, dtype, weights_dtype, placement):
    taken = []

    def take(self, shape, dtype):
        tensor = real(self, shape, dtype)
        taken.append(tensor.nbytes)
        return tensor

    real = HugeArena.take
    monkeypatch.setattr(HugeArena, "take", take)
    folder = save_model(random_model(CONFIGS[name]()).bfloat16(), tmp_path)
    info = build(folder, weights_dtype, "huge", dtype=dtype, **placement).info
    (model,) = info.models
    assert sum(taken) == model.attention_bytes + model.ffn_bytes
    assert info.weights_used_bytes == info.weights_pool_bytes == model.ffn_bytes
    assert model.weights_dtype == ("int8" if weights_dtype == "int8" else dtype)


@pytest.mark.parametrize(
    ("weights_dtype", "memory"), [("int8", "mapped"), ("auto", "huge"), ("auto", "mapped")]
)
def test_of_what_is_copied_the_file_is_given_back(build, tmp_path, weights_dtype, memory):
    folder = save_model(random_model(CONFIGS["qwen3-moe-normalised"]()), tmp_path)
    engine = build(folder, weights_dtype, memory)
    gc.collect()
    mapped = str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    assert mapped == ((weights_dtype, memory) == ("auto", "mapped"))
    assert len(generate(engine)[0]) == LENGTH


def test_a_load_that_fails_halfway_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(spec, checkpoint, layer):
        if spec.architecture == "LlamaForCausalLM" and layer == 1:
            raise RuntimeError("the disk is gone")
        return load_ffn(spec, checkpoint, layer)

    monkeypatch.setattr(runtime, "load_ffn", fails)
    before = set(threading.enumerate())
    names = {"bad": "llama", "good": "qwen3"}
    folders = {key: save_model(random_model(CONFIGS[name]()), tmp_path / key) for key, name in names.items()}
    models = tuple(ModelConfig(key, str(folder), weights_dtype="int8") for key, folder in folders.items())
    engine = build_engine(EngineConfig(models, PoolConfig(kv_pool_bytes=1 << 21), threads=1))
    try:
        assert engine.info.model("bad").error == "loading failed: RuntimeError: the disk is gone"
        assert engine.info.weights_used_bytes == engine.info.model("good").ffn_bytes
        assert set(engine._executor._models) == {engine.info.model("good").index}
    finally:
        engine.close()
    assert set(threading.enumerate()) <= before


def test_loading_leaves_torch_with_its_threads(build, tmp_path):
    folder = save_model(random_model(CONFIGS["llama"]()), tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        build(folder, "int8")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_int8_head_is_a_copy_of_a_tied_embedding(tmp_path):
    folder = save_model(random_model(CONFIGS["qwen3-bias-tied"]()), tmp_path)
    spec, quantised = read_spec(folder, "bfloat16"), read_spec(folder, "bfloat16", "int8")
    head = spec.vocab_size * spec.hidden_size
    assert spec.head_bytes == 2 * head
    assert quantised.head_bytes == head + 4 * spec.vocab_size
    attention = spec.num_layers * (spec.attention_bytes - quantised.attention_bytes)
    assert quantised.attention_side_bytes == spec.attention_side_bytes - attention + quantised.head_bytes
