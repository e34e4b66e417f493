"""AsyncLLM over a scripted engine: streams, merging, stop strings and aborts."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from crosspool import AsyncLLM, SamplingParams
from crosspool.core.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    ModelUnavailableError,
    OverloadedError,
    RequestTooLargeError,
)
from crosspool.core.request import FinishReason
from crosspool.text.front import ModelFront
from helpers_engine import ScriptedClient, ScriptedEngine, engine_info, model_info
from helpers_tokenizers import byte_level, save

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(
        save(byte_level(), tmp_path_factory.mktemp("model"), chat_template="{{ messages[0].content }}")
    )


@pytest.fixture
async def make(folder):
    llms = []

    async def make_llm(*models, **engine):
        info = engine_info(*(models or (model_info(path=folder),)))
        llms.append(await AsyncLLM.open(ScriptedClient(ScriptedEngine(info, **engine))))
        return llms[-1]

    yield make_llm
    for llm in llms:
        await llm.close()


async def everything(deltas):
    return [delta async for delta in deltas]


def engine_of(llm):
    return llm._client.engine


async def test_generate_streams_deltas(make):
    llm = await make()
    deltas = await everything(llm.generate("dog", SamplingParams(max_tokens=7)))
    ids = llm.front("a").prompt_tokens("dog")
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == list(ids * 7)[:7]
    assert "".join(delta.text for delta in deltas) == llm.front("a").detokenize(tokens)
    assert [delta.output_tokens for delta in deltas] == [2, 4, 6, 7]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, FinishReason.LENGTH]
    assert {delta.prompt_tokens for delta in deltas} == {len(ids)}
    assert engine_of(llm).aborts == []


async def test_choices_of_all_prompts_are_merged(make):
    llm = await make()
    first = await llm.prepare([5], SamplingParams(n=2, max_tokens=5))
    second = await llm.prepare([6], SamplingParams(max_tokens=3))
    deltas = await everything(llm.stream(first, second))
    tokens = {index: [] for index in range(3)}
    for delta in deltas:
        tokens[delta.index] += delta.token_ids
    assert tokens == {0: [5] * 5, 1: [5] * 5, 2: [6] * 3}
    ends = [delta.index for delta in deltas if delta.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    order = [delta.index for delta in deltas]
    assert order != sorted(order), "choices come as they are made, not one after the other"
    assert engine_of(llm).aborts == []


async def test_no_choices(make):
    llm = await make()
    assert await everything(llm.stream()) == []


async def test_chat(make):
    llm = await make()
    submission = await llm.prepare_chat([{"role": "user", "content": "dog"}])
    assert submission.prompt_token_ids == llm.front(None).prompt_tokens("dog")
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        await llm.prepare_chat([])


async def test_a_stop_string_tells_the_engine_and_nothing_more_is_yielded(make):
    llm = await make(tokens_per_step=3)
    prompt = [*llm.front("a").prompt_tokens("lazy "), 2]
    deltas = await everything(llm.generate(prompt, SamplingParams(max_tokens=50, stop="call")))
    assert "".join(delta.text for delta in deltas) == "lazy <|tool "
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert engine_of(llm).finishes == [(0, len(prompt))]
    assert engine_of(llm).aborts == []


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_the_stream_aborts(make, n):
    llm = await make()
    async with aclosing(llm.generate([5], SamplingParams(n=n, max_tokens=60))) as deltas:
        async for _ in deltas:
            break
    assert sorted(engine_of(llm).aborts) == list(range(n))
    assert llm._client._streams == {}


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_task_aborts(make, n):
    llm = await make()
    begun = asyncio.Event()

    async def consume():
        async for _ in llm.generate([5], SamplingParams(n=n, max_tokens=60)):
            begun.set()

    task = asyncio.create_task(consume())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(engine_of(llm).aborts) == list(range(n))


async def test_an_error_of_one_choice_ends_the_others(make):
    llm = await make(queue=2)
    with pytest.raises(OverloadedError):
        await everything(llm.generate([5], SamplingParams(n=3, max_tokens=60)))
    assert sorted(engine_of(llm).aborts) == [0, 1]
    assert not engine_of(llm)._running


async def test_many_streams_at_once(make):
    llm = await make()
    params = SamplingParams(max_tokens=5, n=2)
    results = await asyncio.gather(*(everything(llm.generate([i], params)) for i in range(2, 30)))
    for i, deltas in enumerate(results, start=2):
        assert {token for delta in deltas for token in delta.token_ids} == {i}
    assert len({request.id for request in engine_of(llm).added}) == 56


async def test_refusals_come_from_prepare(make, folder):
    llm = await make(model_info("a", 0, folder), model_info("b", 1, error="corrupt"))
    with pytest.raises(ModelNotFoundError):
        await llm.prepare("dog", model="x")
    with pytest.raises(ModelUnavailableError, match="b does not serve"):
        await llm.prepare("dog", model="b")
    with pytest.raises(InvalidRequestError, match="one of a, b"):
        await llm.prepare("dog")
    with pytest.raises(InvalidRequestError, match="empty"):
        await llm.prepare("", model="a")
    with pytest.raises(RequestTooLargeError):
        await llm.prepare([5] * 70, model="a")
    assert [model.name for model in llm.models] == ["a", "b"]


async def test_tokenizing_leaves_the_event_loop_free(make, monkeypatch):
    llm = await make()
    front = llm.front("a")
    threads = []
    tokenize = front.prompt_tokens
    monkeypatch.setattr(
        front, "prompt_tokens", lambda prompt: threads.append(threading.current_thread()) or tokenize(prompt)
    )
    await llm.prepare("dog")
    assert threads[0] is not threading.main_thread()


async def test_a_model_that_is_slow_to_tokenize_holds_up_no_other(make, folder, monkeypatch):
    llm = await make(model_info("slow", 0, folder), model_info("quick", 1, folder))
    go_on = threading.Event()
    monkeypatch.setattr(llm.front("slow"), "prompt_tokens", lambda prompt: go_on.wait() and (5,))
    slow = [asyncio.create_task(llm.prepare("dog", model="slow")) for _ in range(50)]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(20):
            submission = await llm.prepare("dog", model="quick")
        assert submission.model.name == "quick"
        assert not any(task.done() for task in slow)
    finally:
        go_on.set()
    assert {submission.model.name for submission in await asyncio.gather(*slow)} == {"slow"}


async def test_stats_and_closing(make):
    llm = await make()
    assert (await llm.stats()).kv_pages_total == 16
    await llm.prepare_chat([{"role": "user", "content": "dog"}])
    process = llm.front(None)._template._process._process
    await llm.close()
    assert llm._client.closed
    assert process.returncode is not None


async def test_an_engine_is_closed_if_the_fronts_cannot_be_opened(monkeypatch):
    def fail(model):
        raise MemoryError

    engine = ScriptedEngine(engine_info(model_info()))
    monkeypatch.setattr(ModelFront, "open", fail)
    monkeypatch.setattr("crosspool.llm.async_llm.start_engine", lambda config: engine)
    monkeypatch.setattr("crosspool.llm.async_llm.AsyncEngine", ScriptedClient)
    with pytest.raises(MemoryError):
        await AsyncLLM.build({"a": "folder"})
    assert engine.closed


async def test_the_fronts_follow_an_engine_that_was_started_again(make, folder):
    llm = await make(model_info("a", 0, folder), model_info("b", 1, folder, error="truncated"))
    engine_of(llm).info = engine_info(
        model_info("a", 0, folder, error="truncated"), model_info("b", 1, folder, max_context=6)
    )
    await llm.reopen()
    with pytest.raises(ModelUnavailableError):
        await llm.prepare([5], model="a")
    with pytest.raises(RequestTooLargeError):
        await llm.prepare([5], SamplingParams(max_tokens=6), model="b")
    assert len(await everything(llm.generate("d", SamplingParams(max_tokens=3), model="b"))) > 0


async def test_what_is_being_prepared_when_the_fronts_are_reopened_leaves_no_process(make, monkeypatch):
    llm = await make()
    front, (threads,) = llm.front("a"), llm._threads.values()
    go_on = threading.Event()
    monkeypatch.setattr(front, "prompt_tokens", lambda prompt: go_on.wait() and (5,))
    first = asyncio.create_task(llm.prepare("dog"))
    second = asyncio.create_task(llm.prepare_chat([{"role": "user", "content": "dog"}]))
    await asyncio.sleep(0)
    await llm.reopen()
    go_on.set()
    await asyncio.gather(first, second)
    await asyncio.to_thread(threads.shutdown)
    assert front._template._process._process is None
