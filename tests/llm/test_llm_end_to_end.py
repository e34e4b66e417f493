"""LLM and AsyncLLM over the real engine, with tiny random checkpoints, against transformers."""

from __future__ import annotations

import asyncio
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from transformers import DeepseekV2Config, LlamaConfig, MixtralConfig

from crosspool import LLM, AsyncLLM, SamplingParams
from crosspool.core.errors import (
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    ModelUnavailableError,
    RequestTooLargeError,
)
from crosspool.core.request import FinishReason
from helpers_models import public_logprobs, random_model, save_model
from helpers_tokenizers import byte_level, save

pytestmark = pytest.mark.integration

VOCAB, EOS, CONTEXT = 400, 1, 200
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": EOS,
}
CONFIGS = {
    "dense": LlamaConfig(**COMMON, num_attention_heads=6, num_key_value_heads=3, head_dim=10),
    "moe": MixtralConfig(
        **COMMON,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=10,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "mla": DeepseekV2Config(
        **COMMON,
        moe_intermediate_size=14,
        num_attention_heads=3,
        num_key_value_heads=3,
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
PROMPTS = [[5], [7 * i % VOCAB for i in range(16)], [(11 * i + 3) % VOCAB for i in range(70)]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=7)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """{name: (public model, folder)}."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("zoo")
    models = {}
    for name, config in CONFIGS.items():
        model = random_model(config)
        folder = save_model(model, root / name)
        save(byte_level(), folder, chat_template="{{ messages[-1].content }}")
        models[name] = (model, folder)
    return models


@pytest.fixture(scope="module")
def llm(zoo, tmp_path_factory):
    """All models, and one whose weights are cut short."""
    broken = tmp_path_factory.mktemp("zoo") / "broken"
    shutil.copytree(zoo["dense"][1], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    folders = {name: folder for name, (_, folder) in zoo.items()}
    with LLM({**folders, "broken": broken}, kv_pool_bytes=2**22, threads=1) as llm:
        yield llm
        stats = llm.stats()
        assert stats.kv_pages_held == 0


def test_no_model_can_be_loaded(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no model could be loaded: a: .*config\.json"):
        LLM({"a": tmp_path})


def public_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(public_logprobs(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_tokens_are_those_of_transformers(zoo, llm, name):
    model, folder = zoo[name]
    expected = [public_greedy(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    outputs = llm.generate(PROMPTS, GREEDY, model=name)
    assert [output.token_ids for output in outputs] == expected
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [output.text for output in outputs] == [library.decode(tokens) for tokens in expected]
    assert {output.finish_reason for output in outputs} == {FinishReason.LENGTH}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logprobs_are_those_of_transformers(zoo, llm, name):
    model, _ = zoo[name]
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=8, logprobs=3, ignore_eos=True)
    (output,) = llm.generate([PROMPTS[1]], params, model=name)
    public = public_logprobs(model, PROMPTS[1] + output.token_ids)[len(PROMPTS[1]) - 1 : -1]
    for entry, token, row in zip(output.logprobs, output.token_ids, public, strict=True):
        assert entry.chosen.token_id == token
        assert entry.chosen.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.rank == 1 + int((row > row[token]).sum())
        best = row.topk(3)
        assert [chance.token_id for chance in entry.top] == best.indices.tolist()
        assert [chance.logprob for chance in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def finished(llm, name, reason):
    """How many requests of a model the engine says have ended so."""
    return next(model for model in llm.stats().models if model.name == name).finished.get(reason, 0)


def test_a_stop_string_ends_text_and_request(llm):
    (whole,) = llm.generate("What is", GREEDY, model="moe")
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    before = finished(llm, "moe", "stop")
    (stopped,) = llm.generate("What is", SamplingParams(temperature=0, max_tokens=20, stop=stop), model="moe")
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(whole.token_ids)
    assert (stopped.finish_reason, stopped.completions[0].stop_reason) == (FinishReason.STOP, stop)
    assert finished(llm, "moe", "stop") == before + 1


def test_a_stop_token_counts_but_is_no_text(llm):
    (whole,) = llm.generate([PROMPTS[1]], GREEDY, model="dense")
    token = whole.token_ids[4]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=(token,), ignore_eos=True)
    (stopped,) = llm.generate([PROMPTS[1]], params, model="dense")
    end = whole.token_ids.index(token) + 1
    assert stopped.token_ids == whole.token_ids[:end]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.completions[0].stop_reason == token
    assert stopped.text == llm._fronts.get("dense").detokenize(
        whole.token_ids[: end - 1], skip_special_tokens=True
    )


def test_a_seed_gives_the_same_tokens_alone_and_among_others(llm):
    (alone,) = llm.generate([PROMPTS[1]], SAMPLED, model="mla")
    others = [SamplingParams(max_tokens=9 + i) for i in range(4)]
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[0]]
    among = llm.generate(prompts, [*others[:2], SAMPLED, *others[2:]], model="mla")
    assert among[2].token_ids == alone.token_ids


def test_three_choices(llm):
    def choices(**changes):
        params = SamplingParams(n=3, max_tokens=12, ignore_eos=True, **changes)
        (output,) = llm.generate([PROMPTS[1]], params, model="moe")
        return [choice.token_ids for choice in output.completions]

    assert choices(seed=7) == choices(seed=7)
    assert len({tuple(tokens) for tokens in choices(seed=7)}) == 3
    assert choices() != choices()
    (one,) = llm.generate([PROMPTS[1]], SAMPLED, model="moe")
    assert choices(seed=7)[0] == one.token_ids
    assert len({tuple(tokens) for tokens in choices(temperature=0)}) == 1


def test_chat_is_its_rendered_prompt(llm):
    (chat,) = llm.chat([{"role": "user", "content": "What is"}], GREEDY, model="moe")
    (text,) = llm.generate("What is", GREEDY, model="moe")
    assert (chat.prompt_token_ids, chat.text) == (text.prompt_token_ids, text.text)


def test_prompt_and_output_fill_the_context(llm):
    (output,) = llm.generate(
        [[5] * (CONTEXT - 3)], SamplingParams(max_tokens=None, ignore_eos=True), model="dense"
    )
    assert len(output.token_ids) == 3
    with pytest.raises(RequestTooLargeError, match=f"{CONTEXT + 1} tokens"):
        llm.generate([[5] * (CONTEXT - 3)], SamplingParams(max_tokens=4), model="dense")


def test_bad_calls_leave_nothing_behind(llm):
    with pytest.raises(ModelNotFoundError):
        llm.generate("x", model="nothing")
    with pytest.raises(ModelUnavailableError, match="broken does not serve"):
        llm.generate("x", model="broken")
    with pytest.raises(InvalidRequestError, match=f"token id {VOCAB}"):
        llm.generate([[5], [VOCAB]], model="moe")
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate("", model="moe")
    stats = llm.stats()
    assert stats.kv_pages_held == 0


def test_an_interrupt_frees_every_page(llm, monkeypatch):
    step = llm._engine.step
    steps = []

    def interrupted():
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True), model="moe")
    monkeypatch.undo()
    assert finished(llm, "moe", "abort") == len(PROMPTS)
    (output,) = llm.generate([PROMPTS[0]], GREEDY, model="moe")
    assert len(output.token_ids) == GREEDY.max_tokens
    stats = llm.stats()
    assert stats.kv_pages_held == 0


async def test_async_streams_of_all_models_at_once(zoo, llm):
    expected = {name: [o.token_ids for o in llm.generate(PROMPTS, GREEDY, model=name)] for name in zoo}
    folders = {name: folder for name, (_, folder) in zoo.items()}
    twin = await AsyncLLM.build(folders, kv_pool_bytes=2**22, threads=1)
    try:

        async def tokens(name, prompt):
            deltas = [delta async for delta in twin.generate(prompt, GREEDY, model=name)]
            return [token for delta in deltas for token in delta.token_ids]

        names = list(zoo)
        jobs = [asyncio.gather(*(tokens(name, prompt) for prompt in PROMPTS)) for name in names]
        assert dict(zip(names, await asyncio.gather(*jobs), strict=True)) == expected
    finally:
        await twin.close()
