"""The whole zoo against transformers, which knows nothing of CrossPool."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosspool.demo.zoo import Weights
from crosspool.models.registry import read_spec
from helpers_zoo import demo_zoo, model_folder

pytestmark = pytest.mark.integration

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SMOLLM2 = ["smollm2-135m", "smollm2-moe-4x", "smollm2-moe-8x"]
TEXT = (
    "Once upon a time, there was a little girl who lived in a small village near the forest. Every day she "
    "went to visit her grandmother, who lived on the other side of the forest."
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SMOLLM2)
def test_the_real_and_the_upcycled_models_know_the_capital_of_france(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder(name))
    model = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype="auto")
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


def test_the_upcycled_model_computes_what_the_dense_one_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    logits = []
    for name in ("smollm2-135m", "smollm2-moe-4x"):
        model = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)
        with torch.inference_mode():
            output = model(ids, labels=ids)
        logits.append(output.logits)
        assert output.loss.item() < 2.2  # 1.8; with the query and key rows as the GGUF file has them 2.8
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    assert torch.allclose(logits[0], logits[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["random-qwen3-moe", "random-deepseek-v2"])
def test_the_random_models_load_whole(name: str) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        model_folder(name), dtype="auto", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], (problem, report[problem])
    parameters = next(entry.parameters for entry in demo_zoo().models if entry.name == name)
    assert sum(weights.numel() for weights in model.parameters()) == parameters
    with torch.inference_mode():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_our_own_reading_of_every_config_counts_the_same_weights() -> None:
    for model in demo_zoo().models:
        spec = read_spec(model_folder(model.name))
        assert spec.architecture == model.architecture
        assert spec.attention_side_bytes + spec.total_ffn_bytes == model.parameters * 2
        assert spec.eos_token_ids == (2,)


def test_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    assert tokenizer("<|im_start|><|im_end|><|endoftext|>")["input_ids"] == [1, 2, 0]
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for text in ("Hello, world!", " two  spaces\n\n\ttab", "naïve café 日本語 🙂", "1,234.5 + 6"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_index_says_what_is_real_and_what_is_random() -> None:
    zoo = demo_zoo()
    assert {model.name: model.weights for model in zoo.models} == {
        "smollm2-135m": Weights.REAL,
        "smollm2-moe-4x": Weights.UPCYCLED,
        "smollm2-moe-8x": Weights.UPCYCLED,
        "random-qwen3-moe": Weights.RANDOM,
        "random-deepseek-v2": Weights.RANDOM,
    }
    for model in zoo.models:
        folder = zoo.folder(model)
        assert model.weights.value in (folder / "README.md").read_text()
        assert "Apache License" in (folder / "LICENSE").read_text()
        assert json.loads((folder / "config.json").read_text())["architectures"] == [model.architecture]
