"""With the real engine, what is taken from the prefix cache leads to the same bits as what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, MistralConfig, Qwen3MoeConfig

from crosspool import LLM, SamplingParams
from crosspool.core.config import SchedulerConfig
from crosspool.llm import RequestOutput
from helpers_models import random_model, save_model

pytestmark = pytest.mark.integration

COMMON = {
    "vocab_size": 300,
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "max_position_embeddings": 700,
    "num_attention_heads": 4,
}
CONFIGS = {
    "gqa": Qwen3MoeConfig(
        **COMMON,
        num_key_value_heads=2,
        head_dim=14,
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=13,
    ),
    "mla": DeepseekV2Config(
        **COMMON,
        num_key_value_heads=4,
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
    "window": MistralConfig(**COMMON, num_key_value_heads=2, head_dim=10, sliding_window=40),
}
KINDS = ("gqa", "mla")
DRAWN = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, seed=5, logprobs=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=3)
THREE = SamplingParams(n=3, temperature=1.0, max_tokens=30, ignore_eos=True, seed=8, logprobs=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("zoo")
    return {name: save_model(random_model(config), root / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[tuple[LLM, LLM]]:
    """An engine with the cache, and one without. 100 pages hold a few prompts' chunks, not all of them."""
    page_bytes = 2**14 if request.param == "float32" else 2**13
    options = {
        "page_bytes": page_bytes,
        "kv_pool_bytes": 100 * page_bytes,
        "dtype": request.param,
        "threads": 2,
        "scheduler": SchedulerConfig(chunk_quantum=16, max_chunk_tokens=64),
    }
    with LLM(folders, **options) as cached, LLM(folders, **options, prefix_cache=False) as plain:
        yield cached, plain


def prompt_of(length: int, start: int) -> list[int]:
    return [(start + 7 * i * i) % 300 for i in range(length)]


def both(
    pair: tuple[LLM, LLM], prompts: list[list[int]], params: SamplingParams, kind: str
) -> list[RequestOutput]:
    """What the engine with the cache makes, once it has been compared with the other's to the last bit."""
    outputs, expected = (llm.generate(prompts, params, model=kind) for llm in pair)
    for output, other in zip(outputs, expected, strict=True):
        for choice, same in zip(output.completions, other.completions, strict=True):
            assert choice.token_ids == same.token_ids
            assert choice.logprobs == same.logprobs
            assert same.cached_tokens == 0
    return outputs


def cached_tokens(outputs: list[RequestOutput]) -> list[int]:
    return [choice.cached_tokens for output in outputs for choice in output.completions]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_once_more_and_a_session_that_goes_on(pair: tuple[LLM, LLM], kind: str) -> None:
    size = next(model.tokens_per_page for model in pair[0].models if model.name == kind)
    history = prompt_of(300, 1)
    assert cached_tokens(both(pair, [history], DRAWN, kind)) == [0]
    for params in (GREEDY, DRAWN):
        assert cached_tokens(both(pair, [history], params, kind)) == [299 // size * size]
    for turn in range(3):
        (output,) = both(pair, [history], DRAWN, kind)
        made = len(history) + 29
        history = [*history, *output.token_ids, *prompt_of(20, turn)]
        (output,) = both(pair, [history], GREEDY, kind)
        assert cached_tokens([output]) == [made // size * size]


@pytest.mark.parametrize("kind", KINDS)
def test_choices_share_a_prompt(pair: tuple[LLM, LLM], kind: str) -> None:
    outputs = both(pair, [prompt_of(200, 2)], THREE, kind)
    assert len({tuple(choice.token_ids) for choice in outputs[0].completions}) == 3
    assert sorted(cached_tokens(outputs))[0] == 0 < sorted(cached_tokens(outputs))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_after_eviction_and_among_others(pair: tuple[LLM, LLM], kind: str) -> None:
    """More prompts than the pool holds, with common beginnings of every length, twice, all at once."""
    prompts = [[*prompt_of(250, 3)[: 25 * i], *prompt_of(300 - 25 * i, 4 + i)] for i in range(10)]
    evicted = evicted_pages(pair[0])
    for _ in range(2):
        assert max(cached_tokens(both(pair, prompts, DRAWN, kind))) > 0
    assert evicted_pages(pair[0]) > evicted
    stats = pair[0].stats()
    assert stats.kv_pages_held == 0 < stats.kv_pages_cached
    assert pair[1].stats().kv_pages_cached == 0


def test_a_model_with_windows_serves_without_a_cache(pair: tuple[LLM, LLM]) -> None:
    for _ in range(2):
        assert cached_tokens(both(pair, [prompt_of(200, 5)], GREEDY, "window")) == [0]
    assert {model.name: model.prefix_cache for model in pair[0].models} == {
        "gqa": True,
        "mla": True,
        "window": False,
    }
    assert not any(model.prefix_cache for model in pair[1].models)


def evicted_pages(llm: LLM) -> int:
    return sum(model.cached_pages_evicted for model in llm.stats().models)
