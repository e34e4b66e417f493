"""What the engine says about one request, turned into text."""

from __future__ import annotations

from dataclasses import dataclass

from crosspool.core.request import EngineOutput, FinishReason, Request, TokenLogprobs
from crosspool.text.detokenizer import Detokenizer
from crosspool.text.stop import StopMatcher, StopStrings
from crosspool.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenChance:
    """One token and its natural-log probability. ``bytes`` are what it adds to a text, ``text`` the same read
    as UTF-8 (U+FFFD for a part of a character)."""

    token_id: int
    logprob: float
    text: str
    bytes: bytes


@dataclass(frozen=True, slots=True)
class OutputLogprobs:
    """An output token, its rank in the vocabulary (1: the most probable) and the most probable ones in its
    place, best first."""

    chosen: TokenChance
    rank: int
    top: tuple[TokenChance, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new about one choice since its last delta.

    ``index`` is the choice's place among all choices of the call. ``text`` may lag behind ``token_ids``: it
    is held back while it may become a stop string or a character is incomplete. ``logprobs`` has an entry per
    new token if they were asked for. ``stop_reason`` is the stop string or stop token that ended the choice
    (None for an end-of-sequence token). ``output_tokens`` counts from the beginning; of the
    ``prompt_tokens``, ``cached_tokens`` were not computed for this choice.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[OutputLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


class OutputAssembler:
    """The text side of one request: feed it the engine's outputs in order.

    Text leaves out the stop token, and a stop string with all that comes after it. When a stop string is
    complete, the delta has FinishReason.STOP though the engine does not know: ``finish_at`` then says after
    how many output tokens the engine must be told to finish.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        stop_strings: StopStrings | None = None,
        *,
        index: int = 0,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._index = index
        self._tokens = 0
        self._cached_tokens = 0
        params = request.sampling
        self._detokenizer: Detokenizer | None = None
        self._matcher: StopMatcher | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
        if stop_strings is not None:
            self._matcher = StopMatcher(stop_strings, include_stop=params.include_stop_str_in_output)
        self.finished = False
        self.finish_at: int | None = None

    def feed(self, output: EngineOutput) -> TextDelta:
        """The delta for one output. Nothing may be fed once ``finished``."""
        self._cached_tokens += output.cached_tokens
        hidden = self._hidden_stop_token(output)
        text: list[str] = []
        stop: str | None = None
        taken = 0
        for token in output.token_ids:
            taken += 1
            self._tokens += 1
            piece = self._detokenizer.feed(token) if self._detokenizer and token != hidden else ""
            shown, stop = self._match(piece)
            text.append(shown)
            if stop is not None:
                break
        if output.finish_reason is None:
            self.finish_at = None if stop is None else self._tokens
        elif stop is None:
            shown, stop = self._flush()
            text.append(shown)
        self.finished = stop is not None or output.finish_reason is not None
        return TextDelta(
            index=self._index,
            text="".join(text),
            token_ids=output.token_ids[:taken],
            prompt_tokens=len(self._request.prompt_token_ids),
            output_tokens=self._tokens,
            cached_tokens=self._cached_tokens,
            logprobs=self._logprobs(output, taken),
            finish_reason=output.finish_reason if stop is None else FinishReason.STOP,
            stop_reason=self._stop_token(output) if stop is None else stop,
            error=output.error,
        )

    def _match(self, piece: str) -> tuple[str, str | None]:
        """Text to show and the stop string completed. The first ``min_tokens`` tokens complete none."""
        if self._matcher is None or self._tokens <= self._request.sampling.min_tokens:
            return piece, None
        matched = self._matcher.feed(piece)
        return matched.text, matched.stop

    def _flush(self) -> tuple[str, str | None]:
        shown, stop = self._match(self._detokenizer.finish() if self._detokenizer else "")
        if stop is None and self._matcher is not None:
            shown += self._matcher.finish()
        return shown, stop

    def _hidden_stop_token(self, output: EngineOutput) -> int | None:
        """The stop token that ends the output and is no part of its text. It can only be the last token."""
        ended = output.finish_reason is FinishReason.STOP and bool(output.token_ids)
        if not ended or self._request.sampling.include_stop_str_in_output:
            return None
        last = output.token_ids[-1]
        return last if last in self._request.stop_token_ids else None

    def _stop_token(self, output: EngineOutput) -> int | None:
        if output.finish_reason is not FinishReason.STOP or not output.token_ids:
            return None
        last = output.token_ids[-1]
        return last if last in self._request.sampling.stop_token_ids else None

    def _logprobs(self, output: EngineOutput, taken: int) -> tuple[OutputLogprobs, ...] | None:
        if self._request.sampling.logprobs is None:
            return None
        pairs = zip(output.token_ids[:taken], output.logprobs[:taken], strict=True)
        return tuple(self._described(token, logprobs) for token, logprobs in pairs)

    def _described(self, token: int, logprobs: TokenLogprobs) -> OutputLogprobs:
        top = tuple(self._chance(other, logprob) for other, logprob in logprobs.top)
        return OutputLogprobs(self._chance(token, logprobs.logprob), logprobs.rank, top)

    def _chance(self, token: int, logprob: float) -> TokenChance:
        content = self._tokenizer.token_bytes(token) if self._tokenizer else b""
        return TokenChance(token, logprob, content.decode("utf-8", "replace"), content)
