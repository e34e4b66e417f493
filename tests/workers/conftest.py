"""Two tiny models, one of each kind of attention, and what they say."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config, Qwen3MoeConfig

from helpers_models import PagedModel, random_model, save_model
from helpers_workers import PROMPTS, TinyModel


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=[False, True], ids=["reference", "resident"])
def resident(request):
    """Which of the two executors a test is about: both keep the same contract."""
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    gqa = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=14,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        num_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    mla = DeepseekV2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=3,
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
        max_position_embeddings=512,
    )
    return [save_model(random_model(config), tmp_path_factory.mktemp("model")) for config in (gqa, mla)]


@pytest.fixture(scope="session")
def models(folders):
    return [TinyModel.load(folder) for folder in folders]


@pytest.fixture(scope="session")
def expected(folders):
    """Greedy tokens of each model and prompt, without executor: one sequence, layer after layer."""

    def greedy(folder, prompt, count=24):
        model = PagedModel(folder)
        first = int(model.prefill("it", prompt)[-1].argmax())
        return model.greedy("it", first, count)[0]

    return [[greedy(folder, prompt) for prompt in PROMPTS] for folder in folders]
