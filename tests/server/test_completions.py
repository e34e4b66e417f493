from __future__ import annotations

from typing import Any

import pytest

from helpers_sse import read_events
from helpers_tiny_tokenizer import VOCAB_SIZE

pytestmark = pytest.mark.integration

PATH = "/v1/completions"
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 5,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "abc", "max_tokens": 5, **fields}


async def token_ids(application, text: str) -> list[int]:
    return (await application.post("/tokenize", model="tiny", prompt=text)).json()["tokens"]


async def test_a_whole_answer_has_openais_shape(application) -> None:
    answer = (await application.post(PATH, **body())).json()
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": USAGE,
    }


async def test_a_streamed_answer_comes_in_events(application) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = read_events((await application.post(PATH, **body(**options))).text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcab"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"] == USAGE


async def test_sixteen_tokens_are_made_if_no_number_is_given(application) -> None:
    answer = (await application.post(PATH, model="tiny", prompt="abc")).json()
    assert answer["usage"]["completion_tokens"] == 16


async def test_every_form_of_prompt(application) -> None:
    abc, xy = await token_ids(application, "abc"), await token_ids(application, "xy")
    for prompt, texts in [
        ("abc", ["abcab"]),
        (["abc", "xy"], ["abcab", "xyxyx"]),
        (abc, ["abcab"]),
        ([abc, xy], ["abcab", "xyxyx"]),
    ]:
        answer = (await application.post(PATH, **body(prompt=prompt))).json()
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
        assert answer["usage"]["completion_tokens"] == 5 * len(texts)


async def test_choices_of_several_prompts_are_numbered_in_order(application) -> None:
    choices = (await application.post(PATH, **body(prompt=["abc", "xy"], n=2))).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (0, "abcab"),
        (1, "abcab"),
        (2, "xyxyx"),
        (3, "xyxyx"),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_parallel_lists(application, stream: bool) -> None:
    response = await application.post(PATH, **body(prompt="aé", logprobs=1, max_tokens=6, stream=stream))
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in read_events(response.text)[:-1]]
        logprobs = {key: [entry for part in parts for entry in part[key]] for key in parts[0]}
    else:
        logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "�", "�", "a", "�", "�"]
    assert logprobs["token_logprobs"] == [-0.5] * 6
    assert logprobs["top_logprobs"][0] == {"a": -0.5}
    assert logprobs["text_offset"] == [0, 1, 2, 2, 3, 4]


async def test_a_prompt_of_one_token_and_one_token_of_answer(application) -> None:
    answer = (await application.post(PATH, **body(prompt="z", max_tokens=1))).json()
    assert answer["choices"][0]["text"] == "z"


async def test_half_a_character_is_never_sent(application) -> None:
    response = await application.post(PATH, **body(prompt="日本", max_tokens=8, stream=True))
    pieces = [chunk["choices"][0]["text"] for chunk in read_events(response.text)[:-1]]
    assert [piece for piece in pieces if piece] == ["日", "本", "�"]


@pytest.mark.parametrize(
    ("fields", "parameter", "text"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": [[1], []]}, "prompt", "empty"),
        ({"prompt": [1, "a"]}, "prompt", "must be text"),
        ({"prompt": [[1, True]]}, "prompt", "must be text"),
        ({"prompt": 3}, "prompt", "must be text"),
        ({"prompt": None}, "prompt", "must be text"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", str(VOCAB_SIZE)),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
        ({"prompt": ["a"] * 33, "n": 8}, "n", "264 choices, at most 256"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"add_special_tokens": False}, "add_special_tokens", "always true"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"max_tokens": 0}, "max_tokens", "must be within 1"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "0 and 100"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": 17}, "n", "16"),
        ({"stop": [1]}, "stop", "string"),
        ({"stop": [""]}, "stop", "1 to 512"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "vocabulary"),
        ({"seed": 2**63}, "seed", "within"),
        ({"min_tokens": 6}, "min_tokens", "above max_tokens"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"model": None}, "model", "string"),
    ],
)
async def test_wrong_types_and_ranges_are_refused_by_name(
    application, fields: dict[str, Any], parameter: str, text: str
) -> None:
    response = await application.post(PATH, **body(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == parameter
    assert text in error["message"]


async def test_a_missing_field_is_named(application) -> None:
    error = (await application.post(PATH, model="tiny")).json()["error"]
    assert error["param"] == "prompt"


async def test_half_a_surrogate_pair_is_refused(application) -> None:
    content = b'{"model": "tiny", "prompt": "\\ud800"}'
    response = await application.client.post(
        PATH, content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert "surrogate" in response.json()["error"]["message"]


async def test_too_long_a_request_is_refused_with_the_numbers(application) -> None:
    response = await application.post(PATH, **body(prompt="x" * 100, max_tokens=1000))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    for number in ("100", "1000", "1100", "900"):
        assert number in error["message"]


async def test_all_sampling_fields_reach_the_engine(application, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "stop": ["zz"],
        "stop_token_ids": [200],
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logprobs": 3,
    }
    seen = []
    add = application.engine.add
    monkeypatch.setattr(application.engine, "add", lambda request: (seen.append(request), add(request))[1])
    assert (await application.post(PATH, **body(**fields))).status_code == 200
    params = seen[0].sampling
    assert {name: getattr(params, name) for name in fields} == {
        **fields,
        "stop": ("zz",),
        "stop_token_ids": (200,),
    }
    assert (seen[0].seed, seen[0].max_tokens, seen[0].stop_token_ids) == (11, 5, {200})
