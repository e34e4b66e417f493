"""A request as the engine sees it, and what the engine says about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended. STOP and LENGTH are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. ``n`` > 1 is made into several of these before the engine.

    ``seed`` is resolved: the draw for output token i is a function of (seed, i) alone.
    ``stop_token_ids`` holds the model's end-of-sequence ids too, unless the client ignores them.
    ``arrival`` is on the engine's clock. Only requests of one ``tenant`` use what each other has computed.
    """

    id: RequestId
    model: ModelIndex
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    seed: int
    stop_token_ids: frozenset[int]
    arrival: Nanoseconds
    tenant: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one output token, before temperature and filters (as OpenAI reports them).

    ``top`` holds (token id, logprob), most probable first.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What is new about one request since the last output: tokens in order, then perhaps its end.

    With the first token, or soon after it, comes ``cached_tokens``: how many tokens of the prompt were not
    computed for it.
    """

    request: RequestId
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
