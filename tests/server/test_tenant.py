"""Cached tokens are told as OpenAI tells them, and are shared only by requests of one key and salt."""

from __future__ import annotations

import pytest

from helpers_sse import read_events

pytestmark = pytest.mark.integration

PATHS = {
    "/v1/completions": {"prompt": "a prompt of some length"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a prompt of some length"}]},
}


async def cached(application, path: str, *, key: str | None = None, **fields: object) -> tuple[int, int]:
    """(cached tokens, prompt tokens) of one request."""
    headers = {} if key is None else {"Authorization": key}
    body = {"model": "tiny", "max_tokens": 2, **PATHS[path], **fields}
    response = await application.client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    usage = read_events(response.text)[-2]["usage"] if fields.get("stream") else response.json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_prompt_seen_before_is_cached(application, path: str) -> None:
    assert (await cached(application, path))[0] == 0
    tokens, prompt = await cached(application, path)
    assert tokens == prompt - 1
    streamed = await cached(application, path, stream=True, stream_options={"include_usage": True})
    assert streamed == (prompt - 1, prompt)


@pytest.mark.parametrize("path", PATHS)
async def test_what_one_choice_takes_from_another_is_not_told_as_cached(application, path: str) -> None:
    assert (await cached(application, path, n=3))[0] == 0
    tokens, prompt = await cached(application, path, n=3)
    assert tokens == prompt - 1


async def test_several_prompts_are_summed_up(application) -> None:
    path = "/v1/completions"
    await cached(application, path, prompt="abcdef")
    assert (await cached(application, path, prompt=["abcdef", "xyz"], n=2)) == (5, 9)


@pytest.mark.parametrize("path", PATHS)
async def test_keys_and_salts_keep_tenants_apart(application, path: str) -> None:
    callers = [
        {},
        {"cache_salt": "one"},
        {"cache_salt": "two"},
        {"key": "Bearer first"},
        {"key": "Bearer second"},
        {"key": "Bearer first", "cache_salt": "one"},
    ]
    for caller in callers:
        assert (await cached(application, path, **caller))[0] == 0, caller
    for caller in callers:
        assert (await cached(application, path, **caller))[0] > 0, caller
    assert (await cached(application, path, key="bearer  first"))[0] > 0


async def test_an_empty_salt_is_refused(application) -> None:
    response = await application.post("/v1/completions", model="tiny", prompt="a", cache_salt="")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"
