"""Requests in the shapes of OpenAI's API, with vLLM's further sampling fields.

Fields that are not declared are ignored, as clients send many. Fields that would change the answer and are
not served are declared, and refused unless they ask for what is done anyway. Numbers have their ranges in
SamplingParams, which raises InvalidRequestError naming the field.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from crosspool.core.errors import InvalidRequestError
from crosspool.core.sampling import MAX_LOGPROBS, SamplingParams

SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("stop", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)


# A list ends at its first wrong item: an error for each of a million would keep the event loop for seconds.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class ApiModel(BaseModel):
    """Strict: a number in quotes is no number."""

    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(ApiModel):
    include_usage: bool | None = None


class GenerationRequest(ApiModel):
    """What chat and text completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = Field(None, min_length=1)

    logit_bias: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: Any = None
    best_of: Any = None
    prompt_logprobs: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    truncate_prompt_tokens: Any = None
    add_special_tokens: bool | None = None

    ADDS_SPECIAL_TOKENS: ClassVar[bool]
    REFUSED: ClassVar[tuple[str, ...]] = (
        *("logit_bias", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
        *("guided_grammar", "use_beam_search", "prompt_logprobs", "bad_words", "allowed_token_ids"),
        "truncate_prompt_tokens",
    )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> SamplingParams:
        """The fields given; the rest as SamplingParams has them. Raises InvalidRequestError."""
        self._check_supported()
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**given, max_tokens=self._max_tokens(), logprobs=self._logprobs())

    def _max_tokens(self) -> int | None:
        raise NotImplementedError

    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def _check_supported(self) -> None:
        for name in self.REFUSED:
            if getattr(self, name):
                raise InvalidRequestError(f"{name} is not supported", parameter=name)
        if self.best_of not in (None, 1, self.n):
            raise InvalidRequestError("best_of is not supported", parameter="best_of")
        if self.add_special_tokens not in (None, self.ADDS_SPECIAL_TOKENS):
            raise InvalidRequestError(
                f"add_special_tokens is always {str(self.ADDS_SPECIAL_TOKENS).lower()} here",
                parameter="add_special_tokens",
            )
        if self.response_format not in (None, {"type": "text"}):
            raise InvalidRequestError(
                "response_format is not supported, other than text", parameter="response_format"
            )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: Any = None
    documents: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    chat_template: Any = None

    ADDS_SPECIAL_TOKENS = False
    REFUSED = (
        *GenerationRequest.REFUSED,
        *("functions", "audio", "chat_template", "documents", "continue_final_message"),
    )

    def _max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _logprobs(self) -> int | None:
        if not self.logprobs:
            return None
        return self.top_logprobs or 0

    def _check_supported(self) -> None:
        super()._check_supported()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true", parameter="top_logprobs")
        if self.tools and self.tool_choice != "none":
            raise InvalidRequestError("tools are not supported", parameter="tools")
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequestError(
                "tool_choice is not supported, other than none", parameter="tool_choice"
            )
        if self.add_generation_prompt is False:
            raise InvalidRequestError(
                "add_generation_prompt is always true", parameter="add_generation_prompt"
            )
        if self.modalities not in (None, ["text"]):
            raise InvalidRequestError("modalities other than text are not supported", parameter="modalities")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Any
    logprobs: int | None = None
    echo: Any = None
    suffix: Any = None

    ADDS_SPECIAL_TOKENS = True
    REFUSED = (*GenerationRequest.REFUSED, "echo", "suffix")

    def prompts(self, most: int) -> list[str | list[int]]:
        """The prompts, one or many: text, token ids, or a list of either. Raises InvalidRequestError.

        More than ``most`` lists are refused before any is looked into.
        """
        prompt = self.prompt
        if prompt in ("", []):
            raise InvalidRequestError("the prompt is empty", parameter="prompt")
        if isinstance(prompt, str) or _all_are(prompt, int):
            return [prompt]
        if isinstance(prompt, list) and isinstance(prompt[0], str | list):
            if len(prompt) > most:
                raise InvalidRequestError(
                    f"prompt has {len(prompt)} prompts, at most {most} are taken", parameter="prompt"
                )
            if _all_are(prompt, str) or all(_all_are(item, int) or item == [] for item in prompt):
                return prompt
        raise InvalidRequestError(
            "the prompt must be text, a list of texts, a list of token ids, or a list of lists of token ids",
            parameter="prompt",
        )

    def _max_tokens(self) -> int | None:
        return SamplingParams().max_tokens if self.max_tokens is None else self.max_tokens

    def _logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(ApiModel):
    """POST /tokenize: a prompt or messages."""

    model: str
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiModel):
    """POST /detokenize."""

    model: str
    tokens: TokenIds


def _all_are(value: object, kind: type) -> bool:
    """Whether ``value`` is a list of ``kind`` alone, with an item at least."""
    return isinstance(value, list) and set(map(type, value)) == {kind}
