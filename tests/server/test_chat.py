from __future__ import annotations

from typing import Any

import pytest

from helpers_sse import read_events
from helpers_tiny_tokenizer import EOS

pytestmark = pytest.mark.integration

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
PROMPT = "user:Hi\nassistant:"
USAGE = {
    "prompt_tokens": len(PROMPT),
    "completion_tokens": 7,
    "total_tokens": len(PROMPT) + 7,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 7, **fields}


async def test_a_whole_answer_has_openais_shape(application) -> None:
    answer = (await application.post(PATH, **body())).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "user:Hi"},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": USAGE,
    }


async def test_a_streamed_answer_has_the_role_first_and_the_finish_reason_last(application) -> None:
    response = await application.post(PATH, **body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = read_events(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in choices) == "user:Hi"
    assert [choice["finish_reason"] for choice in choices] == [None] * 7 + ["length"]


async def test_usage_comes_last_when_it_is_asked_for(application) -> None:
    response = await application.post(PATH, **body(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = read_events(response.text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == USAGE


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_the_token_its_bytes_and_the_alternatives(application, stream: bool) -> None:
    response = await application.post(PATH, **body(logprobs=True, top_logprobs=2, stream=stream))
    if stream:
        choices = [chunk["choices"][0] for chunk in read_events(response.text)[:-1]]
        content = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 7
    assert content[0]["token"] == "u"
    assert content[0]["bytes"] == [ord("u")]
    assert content[0]["logprob"] == -0.5
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["u", "v"]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == pytest.approx([-0.5, -1.2])


async def test_logprobs_without_alternatives(application) -> None:
    answer = (await application.post(PATH, **body(logprobs=True))).json()
    assert [entry["top_logprobs"] for entry in answer["choices"][0]["logprobs"]["content"]] == [[]] * 7


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices(application, stream: bool) -> None:
    response = await application.post(PATH, **body(n=3, stream=stream))
    texts = {0: "", 1: "", 2: ""}
    if stream:
        chunks = read_events(response.text)[:-1]
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
        roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
        assert sorted(roles) == [0, 1, 2]
    else:
        answer = response.json()
        texts.update({choice["index"]: choice["message"]["content"] for choice in answer["choices"]})
        assert answer["usage"]["completion_tokens"] == 21
        assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert texts == dict.fromkeys(range(3), "user:Hi")


async def test_a_stop_string_ends_the_answer_and_is_named(application) -> None:
    (choice,) = (await application.post(PATH, **body(stop=["r:", "zzz"]))).json()["choices"]
    assert choice["message"]["content"] == "use"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "r:")


async def test_the_end_of_sequence_token_ends_the_answer_unless_it_is_ignored(application) -> None:
    messages = [{"role": "user", "content": f"a{EOS}b"}]
    fields = {"messages": messages, "max_tokens": 10}
    (choice,) = (await application.post(PATH, **body(**fields))).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("user:a", "stop")
    (choice,) = (await application.post(PATH, **body(**fields, ignore_eos=True))).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("user:ab\na", "length")


async def test_max_completion_tokens_comes_before_max_tokens(application) -> None:
    answer = (await application.post(PATH, **body(max_completion_tokens=3))).json()
    assert answer["usage"]["completion_tokens"] == 3


async def test_without_a_limit_the_answer_may_fill_the_context(application) -> None:
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 870}]}
    answer = (await application.post(PATH, **fields)).json()
    assert answer["usage"]["total_tokens"] == 900


async def test_content_may_come_in_parts_of_text(application) -> None:
    content = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    answer = (await application.post(PATH, **body(messages=[{"role": "user", "content": content}]))).json()
    assert answer["choices"][0]["message"]["content"] == "user:H\n"


async def test_unknown_fields_and_those_that_ask_for_nothing_are_taken(application) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": 1},
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "response_format": {"type": "text"},
        "temperature": None,
        "stop": None,
        "seed": None,
        "stream": None,
        "stream_options": {"include_usage": None},
        "add_special_tokens": False,
        "truncate_prompt_tokens": None,
        "whatever": object.__name__,
    }
    assert (await application.post(PATH, **body(**harmless))).status_code == 200


@pytest.mark.parametrize(
    ("fields", "parameter", "text"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        ({"documents": [{}]}, "documents", "not supported"),
        ({"continue_final_message": True}, "continue_final_message", "not supported"),
        ({"add_special_tokens": True}, "add_special_tokens", "always false"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "always true"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content"),
        ({"messages": [{"content": "Hi"}]}, "messages", "messages[0].role"),
        ({"messages": [{"role": "nobody", "content": "Hi"}]}, "messages", "nobody may not speak"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "type text",
        ),
    ],
)
async def test_what_is_not_supported_or_malformed_is_refused_by_name(
    application, fields: dict[str, Any], parameter: str, text: str
) -> None:
    response = await application.post(PATH, **body(**fields))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == parameter
    assert text in error["message"]
