"""In float32 the same tokens come out whatever else runs, wherever the pools are, and after preemption."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, MistralConfig, MixtralConfig, Qwen3MoeConfig

from crosspool import LLM, SamplingParams
from crosspool.core.config import SchedulerConfig
from helpers_models import random_model, save_model

pytestmark = pytest.mark.integration

COMMON = {
    "vocab_size": 300,
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "max_position_embeddings": 300,
    "num_attention_heads": 3,
}
CONFIGS = {
    "window": MistralConfig(**COMMON, num_key_value_heads=1, head_dim=10, sliding_window=40),
    "mixtral": MixtralConfig(
        **COMMON, num_key_value_heads=3, head_dim=10, num_local_experts=5, num_experts_per_tok=2
    ),
    "qwen3": Qwen3MoeConfig(
        **COMMON,
        num_key_value_heads=1,
        head_dim=14,
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=13,
        tie_word_embeddings=True,
    ),
    "mla": DeepseekV2Config(
        **COMMON,
        num_key_value_heads=3,
        moe_intermediate_size=14,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=14,
        qk_rope_head_dim=6,
        v_head_dim=10,
        num_experts_per_tok=2,
        n_routed_experts=5,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
}
LENGTHS = (1, 16, 33, 70, 130)
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=40, ignore_eos=True, seed=11)
SMALL = SchedulerConfig(chunk_quantum=16, max_chunk_tokens=32, outgrowth_risk=1.0)


def prompts(name: str) -> list[list[int]]:
    return [[(len(name) + 7 * i * length) % 300 for i in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("zoo")
    return {name: save_model(random_model(config), root / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Iterator[dict[tuple[str, int, bool], list[int]]]:
    """Tokens of each prompt, one request at a time on one device: (model, prompt, greedy) -> tokens."""
    tokens = {}
    with LLM(folders, kv_pool_bytes=2**22, dtype="float32", threads=1, scheduler=SMALL) as llm:
        for name in folders:
            for index, prompt in enumerate(prompts(name)):
                for params in (PARAMS, DRAWN):
                    (output,) = llm.generate([prompt], params, model=name)
                    tokens[name, index, params.greedy] = output.token_ids
    return tokens


WORLDS = {
    "one device": {},
    "two devices": {"weights_devices": ["cpu:1"]},
    "two KV devices and two weights devices": {
        "kv_devices": ["cpu:0", "cpu:1"],
        "weights_devices": ["cpu:2", "cpu:3"],
    },
    "one KV device and four weights devices": {
        "weights_devices": ["cpu:1", "cpu:2", "cpu:3", "cpu:4"],
    },
    "FFN cut over four weights devices": {
        "weights_devices": ["cpu:1", "cpu:2", "cpu:3", "cpu:4"],
        "sharding": "tensor",
    },
}


@pytest.mark.parametrize("world", WORLDS)
def test_among_other_requests_and_models_and_on_any_devices(
    folders: dict[str, Path], alone: dict[tuple[str, int, bool], list[int]], world: str
) -> None:
    options = {"kv_pool_bytes": 2**22, "dtype": "float32", "threads": 1, "scheduler": SMALL}
    with LLM(folders, **{**options, **WORLDS[world]}) as llm:
        assert llm_tokens(llm, folders) == alone


def test_after_forced_preemption(
    folders: dict[str, Path], alone: dict[tuple[str, int, bool], list[int]]
) -> None:
    """A pool that holds little more than the longest request, and grants that take few pages ahead. Who
    collides with whom is a matter of time, so it may take more than one round."""
    scheduler = replace(SMALL, decode_steps=2)
    with LLM(folders, kv_pool_bytes=170_000, dtype="float32", threads=1, scheduler=scheduler) as llm:
        for _ in range(10):
            assert llm_tokens(llm, folders) == alone
            stats = llm.stats()
            assert stats.kv_pages_held == 0
            if sum(model.preemptions for model in stats.models) > 2:
                return
    pytest.fail("nobody was preempted")


def llm_tokens(llm: LLM, folders: dict[str, Path]) -> dict[tuple[str, int, bool], list[int]]:
    """Every prompt of every model, greedy and drawn, all in flight at once."""
    work = [
        (name, index, params)
        for index in range(len(LENGTHS))
        for name in folders
        for params in (PARAMS, DRAWN)
    ]
    outputs = llm.generate(
        [prompts(name)[index] for name, index, _ in work],
        [params for _, _, params in work],
        model=[name for name, _, _ in work],
    )
    return {
        (name, index, params.greedy): output.token_ids
        for (name, index, params), output in zip(work, outputs, strict=True)
    }
