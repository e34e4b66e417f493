from __future__ import annotations

import pytest

from crosspool.bench.client import new_client
from crosspool.bench.dialect import Dialect, Fields, Prompt, find_dialect, list_models
from crosspool.bench.prompts import Span
from crosspool.core.errors import CrossPoolError
from helpers_canned_server import canned_server
from helpers_stream_server import Behaviour, stream_server

pytestmark = pytest.mark.integration


async def found(behaviour: Behaviour) -> Dialect:
    with stream_server(a=behaviour) as server:
        client = new_client(server.url)
        return await find_dialect(client, "a", Span(100, 200), 20)


@pytest.mark.parametrize(
    ("refuses", "prompt", "fields"),
    [
        ((), Prompt.TOKEN_IDS, Fields.EXACT),
        (("ignore_eos",), Prompt.TOKEN_IDS, Fields.COUNTED),
        (("temperature",), Prompt.TOKEN_IDS, Fields.PLAIN),
        (("prompt ids",), Prompt.TEXT, Fields.EXACT),
        (("completions",), Prompt.CHAT, Fields.EXACT),
        (("completions", "ignore_eos"), Prompt.CHAT, Fields.COUNTED),
    ],
)
async def test_the_most_exact_way_that_the_server_takes(
    refuses: tuple[str, ...], prompt: Prompt, fields: Fields
) -> None:
    dialect = await found(Behaviour(refuses=refuses))
    assert (dialect.prompt, dialect.fields) == (prompt, fields)
    assert (dialect.refusal is None) == (not refuses)
    if refuses:
        assert dialect.refusal == f"HTTP 400: {min(refuses)} is not supported"


@pytest.mark.parametrize("status", [500, 503])
async def test_a_server_that_answers_nothing(status: int) -> None:
    with pytest.raises(CrossPoolError, match=f"measured with a: HTTP {status}: no answer from this one"):
        await found(Behaviour(status=status))


async def test_models_are_listed() -> None:
    with stream_server(a=Behaviour(), b=Behaviour()) as server:
        client = new_client(server.url)
        assert await list_models(client, 20) == ["a", "b"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"data": []}, "serves no models"),
        ({"models": []}, "OpenAI-compatible"),
        (["a"], "OpenAI-compatible"),
        (None, "does not list its models"),
    ],
)
async def test_what_lists_no_models(answer: object, said: str) -> None:
    with canned_server() as server:
        if answer is not None:
            server.answer_json("/v1/models", answer)
        client = new_client(server.url)
        with pytest.raises(CrossPoolError, match=said):
            await list_models(client, 20)
