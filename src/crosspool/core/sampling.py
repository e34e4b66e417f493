"""What a client may ask of token choice, with the field names of vLLM's ``SamplingParams``."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from crosspool.core.errors import InvalidRequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 512
MAX_STOP_TOKEN_IDS = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends.

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1 and ``top_p`` 1.0 mean no limit. ``max_tokens`` None means
    up to the model's context. ``logprobs`` is the number of alternatives reported beside the chosen token.
    Penalties: ``repetition_penalty`` looks at prompt and output, ``presence_penalty`` and
    ``frequency_penalty`` at the output only. Raises InvalidRequestError for a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require_int("n", self.n, 1, MAX_N)
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequestError("top_p must be above 0", parameter="top_p")
        _require_int("top_k", self.top_k, -1, 2**31 - 1)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _require_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _require_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", parameter="min_tokens"
            )
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops()

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop)} strings, at most {MAX_STOP_STRINGS} are taken", parameter="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_LENGTH:
                raise InvalidRequestError(
                    f"a stop string must be text of 1 to {MAX_STOP_STRING_LENGTH} characters",
                    parameter="stop",
                )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InvalidRequestError(
                    "a stop string holds half of a surrogate pair, which is not text", parameter="stop"
                ) from None
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} ids, at most {MAX_STOP_TOKEN_IDS} are taken",
                parameter="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0, 2**31 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether token choice depends on the tokens before it other than through the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}", parameter=name)
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be within {low} and {high}, not {value}", parameter=name)


def _require_number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, not {value!r}", parameter=name)
    if not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be within {low:g} and {high:g}, not {value:g}", parameter=name
        )
