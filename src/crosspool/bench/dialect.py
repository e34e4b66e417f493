"""How a server is asked for a stream: found by trying, from the most exact way to the plainest."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from typing import Any

import httpx

from crosspool.bench.client import CUT_OFF, NO_CONNECTION, TIMEOUT, Client, Request, send
from crosspool.bench.prompts import Span, random_text, random_token_ids
from crosspool.core.errors import CrossPoolError

PROBE_PROMPT_TOKENS, PROBE_OUTPUT_TOKENS = 16, 2
HOPELESS = (NO_CONNECTION, CUT_OFF, TIMEOUT, "HTTP 401", "HTTP 403", "HTTP 429", "HTTP 503")
"""What no other way of asking would mend."""


class Prompt(StrEnum):
    """What prompts are made of, and which route takes them."""

    TOKEN_IDS = "token ids"
    TEXT = "text"
    CHAT = "chat"


class Fields(StrEnum):
    """Which fields go along: EXACT makes every answer as long as was asked, COUNTED asks for the usage."""

    EXACT = "ignore_eos, usage"
    COUNTED = "usage"
    PLAIN = "none"


OPTIONAL: dict[Fields, dict[str, Any]] = {
    Fields.EXACT: {"temperature": 0, "stream_options": {"include_usage": True}, "ignore_eos": True},
    Fields.COUNTED: {"temperature": 0, "stream_options": {"include_usage": True}},
    Fields.PLAIN: {},
}


def completion(
    model: str,
    prompt: Sequence[int] | str,
    output_tokens: int,
    *,
    server: str = "",
    fields: Fields = Fields.EXACT,
) -> Request:
    """A request to continue ``prompt``. ``server``: its URL, if the client has none."""
    return _request(f"{server}/v1/completions", model, output_tokens, fields, prompt=prompt)


def _request(path: str, model: str, output_tokens: int, fields: Fields, **asked: object) -> Request:
    body = {"model": model, **asked, "max_tokens": output_tokens, "stream": True, **OPTIONAL[fields]}
    return Request(model, path, json.dumps(body).encode(), output_tokens)


@dataclass(frozen=True, slots=True)
class Dialect:
    """``refusal`` is what the server said to the most exact way, if it did not take that."""

    prompt: Prompt
    fields: Fields
    refusal: str | None = None

    def request(
        self, rng: random.Random, model: str, prompt_tokens: int, output_tokens: int, ids: Span
    ) -> Request:
        """A request with a random prompt. ``ids``: which token ids prompts are made of."""
        if self.prompt is Prompt.TOKEN_IDS:
            drawn = random_token_ids(rng, prompt_tokens, ids)
            return completion(model, drawn, output_tokens, fields=self.fields)
        text = random_text(rng, prompt_tokens)
        if self.prompt is Prompt.TEXT:
            return completion(model, text, output_tokens, fields=self.fields)
        messages = [{"role": "user", "content": text}]
        return _request("/v1/chat/completions", model, output_tokens, self.fields, messages=messages)


async def find_dialect(client: Client, model: str, ids: Span, timeout: float) -> Dialect:
    """The first dialect in which ``model`` answers a short request, which also warms it up.

    Raises CrossPoolError with what the server said to the first if there is none.
    """
    rng = random.Random(f"probe {model}")
    refusal = None
    for prompt, fields in product(Prompt, Fields):
        dialect = Dialect(prompt, fields)
        request = dialect.request(rng, model, PROBE_PROMPT_TOKENS, PROBE_OUTPUT_TOKENS, ids)
        failure = (await send(client, request, timeout=timeout)).failure
        if failure is None:
            return replace(dialect, refusal=refusal)
        said = f"{failure.kind}: {failure.message}"
        if failure.kind in HOPELESS:
            raise CrossPoolError(f"{client.url} cannot be measured with {model}: {said}")
        refusal = refusal or said
    raise CrossPoolError(f"{client.url} cannot be measured with {model}: {refusal}")


async def list_models(client: Client, timeout: float) -> list[str]:
    """What /v1/models lists. Raises CrossPoolError."""
    try:
        async with httpx.AsyncClient(base_url=client.url, headers=client.headers, timeout=timeout) as http:
            answer = await http.get("/v1/models")
        answer.raise_for_status()
        models = [str(entry["id"]) for entry in answer.json()["data"]]
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise CrossPoolError(f"{client.url} does not list its models: {reason}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CrossPoolError(f"{client.url} does not answer as an OpenAI-compatible server") from error
    if not models:
        raise CrossPoolError(f"{client.url} serves no models")
    return models
