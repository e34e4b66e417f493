"""The upcycled model of the demo zoo says what the dense one says, and both what transformers says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from crosspool import LLM, SamplingParams
from helpers_zoo import model_folder

pytestmark = pytest.mark.integration

NAMES = ("smollm2-135m", "smollm2-moe-4x")
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain in simple words why the sky is blue.",
    "List five uses of a paper clip.",
    "Translate 'good morning' into Spanish and German.",
)
GREEDY = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_models_make_the_same_200_tokens(dtype: str) -> None:
    conversations = [[{"role": "user", "content": text}] for text in PROMPTS]
    with LLM({name: model_folder(name) for name in NAMES}, kv_pool_bytes=2**28, dtype=dtype) as llm:
        dense, upcycled = (llm.chat(conversations, GREEDY, model=name) for name in NAMES)
    made = [output.token_ids for output in dense]
    assert [len(tokens) for tokens in made] == [200] * len(PROMPTS)
    assert [output.token_ids for output in upcycled] == made
    if dtype == "float32":
        expect_greedy_of_transformers([output.prompt_token_ids for output in dense], made)


def expect_greedy_of_transformers(prompts: list[list[int]], outputs: list[list[int]]) -> None:
    """One pass over prompt and output suffices: if every token is the most likely one after those before it,
    the whole is what greedy generation makes."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(model_folder(NAMES[0]), dtype=torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output
