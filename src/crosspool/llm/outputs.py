"""What a blocking call returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosspool.core.request import FinishReason
from crosspool.text.output import OutputLogprobs, TextDelta


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. ``logprobs`` has an entry per token if asked for. ``cached_tokens`` of its prompt were
    found in the prefix cache, or computed for another choice.

    ``stop_reason`` is the stop string or stop token that ended it (None for an end-of-sequence token).
    ``finish_reason`` ERROR means that the engine failed in the middle: ``error`` says how.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[OutputLogprobs] | None = None
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one prompt came to: ``n`` completions, of which the properties show the first.

    ``prompt`` is None where the prompt was given as token ids.
    """

    model: str
    prompt: str | None
    prompt_token_ids: list[int]
    completions: list[CompletionOutput]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[OutputLogprobs] | None:
        return self.completions[0].logprobs


def completion(deltas: Sequence[TextDelta], index: int) -> CompletionOutput:
    """One choice from all its deltas, the last of which has a finish reason."""
    last = deltas[-1]
    assert last.finish_reason is not None
    logprobs = None
    if last.logprobs is not None:
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return CompletionOutput(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=logprobs,
        cached_tokens=last.cached_tokens,
        error=last.error,
    )
