"""LLM over a scripted engine: every token is known in advance."""

import pytest

from crosspool import LLM, SamplingParams
from crosspool.core.errors import (
    CrossPoolError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelUnavailableError,
    OverloadedError,
    RequestTooLargeError,
)
from crosspool.core.request import EngineOutput, FinishReason
from crosspool.text.front import ModelFront
from helpers_engine import ScriptedEngine, engine_info, model_info
from helpers_tokenizers import byte_level, save

pytestmark = pytest.mark.integration

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if tools %}T{% endif %}{{ mark }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save(byte_level(), tmp_path_factory.mktemp("model"), chat_template=TEMPLATE))


@pytest.fixture
def make(folder):
    llms = []

    def make_llm(*models, seed=0, **engine):
        info = engine_info(*(models or (model_info(path=folder),)))
        llms.append(LLM.from_engine(ScriptedEngine(info, **engine), seed=seed))
        return llms[-1]

    yield make_llm
    for llm in llms:
        llm.close()


def test_a_text(make):
    llm = make()
    (output,) = llm.generate("dog", SamplingParams(max_tokens=7))
    assert output.text == ("dog" * 7)[: len(output.text)]
    assert output.token_ids == (output.prompt_token_ids * 7)[:7]
    assert (output.model, output.prompt, output.finish_reason) == ("a", "dog", FinishReason.LENGTH)
    assert output.logprobs is None
    assert len(output.completions) == 1


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([5, 6], [[5, 6]]),
        ((5, 6), [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ([], []),
        (range(5, 7), [[5, 6]]),
    ],
)
def test_forms_of_prompts(make, prompts, expected):
    outputs = make().generate(prompts)
    assert [output.prompt_token_ids for output in outputs] == expected
    assert all(output.prompt is None for output in outputs)


def test_texts_and_ids_mixed_and_in_order(make):
    llm = make(tokens_per_step=1)
    params = [SamplingParams(max_tokens=9), SamplingParams(max_tokens=1), SamplingParams(max_tokens=4)]
    outputs = llm.generate(["dog", [5], "the"], params)
    assert [output.prompt for output in outputs] == ["dog", None, "the"]
    assert [len(output.token_ids) for output in outputs] == [9, 1, 4]
    assert outputs[1].token_ids == [5]


def test_stop_strings_end_the_request_in_the_engine(make):
    llm = make(tokens_per_step=3)
    ids = llm._fronts.get("a").prompt_tokens("lazy ")
    prompt = [*ids, 2]
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=50, stop="call"))
    assert output.text == "lazy <|tool "
    assert output.token_ids == prompt
    assert output.finish_reason is FinishReason.STOP
    assert output.completions[0].stop_reason == "call"
    assert llm._engine.finishes == [(0, len(prompt))]
    assert not llm._engine.has_work()


def test_n_completions(make):
    llm = make(script=lambda request: [5 + request.seed % 7] * request.max_tokens)
    (output,) = llm.generate([[9]], SamplingParams(n=3, seed=1, max_tokens=2))
    seeds = [request.seed for request in llm._engine.added]
    assert [c.token_ids for c in output.completions] == [[5 + seed % 7] * 2 for seed in seeds]
    assert [c.index for c in output.completions] == [0, 1, 2]
    assert output.token_ids == output.completions[0].token_ids


def test_logprobs(make):
    (output,) = make().generate([[3, 4]], SamplingParams(max_tokens=5, logprobs=2))
    assert [entry.chosen.token_id for entry in output.logprobs] == output.token_ids
    assert [len(entry.top) for entry in output.logprobs] == [2] * 5


def test_the_seed_of_the_llm_makes_calls_reproducible(make):
    def seeds(seed):
        llm = make(seed=seed)
        llm.generate([[3], [4]])
        llm.generate([5])
        return [request.seed for request in llm._engine.added]

    assert seeds(3) == seeds(3)
    assert seeds(3) != seeds(4)
    assert len(set(seeds(3))) == 3


def test_more_prompts_than_the_queue_takes(make):
    llm = make(queue=3)
    outputs = llm.generate([[i] for i in range(2, 12)], SamplingParams(max_tokens=3))
    assert [output.token_ids for output in outputs] == [[i] * 3 for i in range(2, 12)]


def test_a_queue_that_never_has_room(make):
    with pytest.raises(OverloadedError):
        make(queue=0).generate([5])


def test_chat(make):
    llm = make()
    hi = [{"role": "user", "content": "dog"}]
    ids = list(llm._fronts.get(None).prompt_tokens("dog"))
    assert [output.prompt_token_ids for output in llm.chat(hi)] == [ids]
    assert len(llm.chat([hi, hi], [SamplingParams(), SamplingParams()])) == 2
    (output,) = llm.chat(hi, tools=[{}], chat_template_kwargs={"mark": "!"})
    assert llm._fronts.get(None).detokenize(output.prompt_token_ids) == "dogT!"
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        llm.chat([])


def test_models_by_name(make, folder):
    llm = make(
        model_info("a", 0, folder),
        model_info("b", 1, folder),
        model_info("c", 2, error="model.safetensors is truncated"),
    )
    assert [model.name for model in llm.models] == ["a", "b", "c"]
    (output,) = llm.generate("dog", model="b")
    assert output.model == "b"
    assert llm._engine.added[0].model == 1
    with pytest.raises(ModelNotFoundError, match="no model 'x'; there are a, b, c"):
        llm.generate("dog", model="x")
    with pytest.raises(ModelUnavailableError, match="c does not serve: it failed to load") as caught:
        llm.generate("dog", model="c")
    assert "truncated" not in str(caught.value)
    assert llm.models[2].error == "model.safetensors is truncated"
    with pytest.raises(InvalidRequestError, match="one of a, b, c"):
        llm.generate("dog")


@pytest.mark.parametrize(
    ("prompts", "params", "error", "said"),
    [
        (["dog", ""], None, InvalidRequestError, "empty"),
        ([[5], [1000]], None, InvalidRequestError, "token id 1000"),
        ([[5], [5] * 70], None, RequestTooLargeError, "86 tokens"),
        (["dog", None], None, InvalidRequestError, "text or a list"),
        (5, None, InvalidRequestError, "text, token ids, or a list"),
        (["a", "b"], [SamplingParams()], InvalidRequestError, "2 prompts but 1 SamplingParams"),
    ],
)
def test_nothing_starts_if_one_prompt_is_bad(make, prompts, params, error, said):
    llm = make()
    with pytest.raises(error, match=said):
        llm.generate(prompts, params)
    assert llm._engine.added == []


@pytest.mark.parametrize("raised", [KeyboardInterrupt, CrossPoolError])
def test_an_error_midway_aborts_everything(make, monkeypatch, raised):
    llm = make()
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=40)
    take = type(llm._engine).step

    def step(engine):
        if engine.steps == 3:
            engine.steps += 1
            raise raised
        return take(engine)

    monkeypatch.setattr(type(llm._engine), "step", step)
    with pytest.raises(raised):
        llm.generate([[5], [6], [7]], [short, long, long])
    assert sorted(llm._engine.aborts) == [1, 2]
    # What the engine still has to say about them does not disturb the next call.
    (output,) = llm.generate([8], SamplingParams(max_tokens=2))
    assert output.token_ids == [8, 8]


def test_a_request_that_fails_in_the_engine_says_so(make, monkeypatch):
    llm = make()
    advance = type(llm._engine)._advance

    def fail_second(engine, request, made):
        if request.id == 1:
            engine._running.pop(request.id)
            return EngineOutput(request.id, (), finish_reason=FinishReason.ERROR, error="out of memory")
        return advance(engine, request, made)

    monkeypatch.setattr(type(llm._engine), "_advance", fail_second)
    good, bad = llm.generate([[5], [6]], SamplingParams(max_tokens=2))
    assert good.finish_reason is FinishReason.LENGTH
    assert (bad.finish_reason, bad.completions[0].error) == (FinishReason.ERROR, "out of memory")


def test_closing(folder):
    engine = ScriptedEngine(engine_info(model_info(path=folder)))
    with LLM.from_engine(engine) as llm:
        llm.chat([{"role": "user", "content": "x"}])
        process = llm._fronts.get(None)._template._process._process
    assert engine.closed
    assert process.returncode is not None
    llm.close()
    with pytest.raises(EngineDeadError, match="this LLM is closed"):
        llm.generate([5])
    assert engine.added[1:] == []


def test_an_engine_is_closed_if_the_fronts_cannot_be_opened(monkeypatch):
    def fail(model):
        raise MemoryError

    monkeypatch.setattr(ModelFront, "open", fail)
    engine = ScriptedEngine(engine_info(model_info()))
    with pytest.raises(MemoryError):
        LLM.from_engine(engine)
    assert engine.closed
