"""The text side of one model: prompts in, requests for the engine out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from crosspool.core.errors import InvalidRequestError, ModelLoadError, RequestTooLargeError
from crosspool.core.ids import Nanoseconds, RequestId
from crosspool.core.info import ModelInfo
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.text.chat_template import ChatTemplate, Message, load_chat_template, normalise_messages
from crosspool.text.output import OutputAssembler
from crosspool.text.stop import StopStrings
from crosspool.text.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Submission:
    """One prompt, ready for the engine: a request per choice, and how their outputs become text."""

    model: ModelInfo
    prompt_token_ids: tuple[int, ...]
    requests: tuple[Request, ...]
    tokenizer: Tokenizer | None
    stop_strings: StopStrings | None

    def assemblers(self, first_index: int = 0) -> list[OutputAssembler]:
        """A fresh assembler for each request, their choices numbered from ``first_index``."""
        return [
            OutputAssembler(request, self.tokenizer, self.stop_strings, index=first_index + i)
            for i, request in enumerate(self.requests)
        ]


class ModelFront:
    """Tokenizer and chat template of one model, and every check of a prompt against what the model can do.

    Without a tokenizer only prompts of token ids are served, and output has no text. Methods block for as
    long as tokenizing or rendering takes; they may be called from any thread.
    """

    def __init__(
        self, model: ModelInfo, tokenizer: Tokenizer | None, template: ChatTemplate | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._template = template

    @classmethod
    def open(cls, model: ModelInfo) -> ModelFront:
        """The front of a model whose folder is ``model.path``.

        What of it cannot be used is logged and left out: the model serves without.
        """
        tokenizer, template = None, None
        try:
            tokenizer = load_tokenizer(model.path)
            template = load_chat_template(model.path, tokenizer.special_tokens)
        except ModelLoadError as error:
            logger.warning("model %s: %s", model.name, error)
        return cls(model, tokenizer, template)

    def close(self) -> None:
        if self._template is not None:
            self._template.close()

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text. Raises InvalidRequestError if it is not text that can be encoded, and
        RequestTooLargeError, before any work, if as many tokens as the model takes could not hold it."""
        tokenizer = self._need_tokenizer()
        try:
            self._check_text_size(len(text.encode()), "prompt")
        except UnicodeEncodeError:
            raise InvalidRequestError(
                "the prompt holds half of a surrogate pair, which is not text", parameter="prompt"
            ) from None
        return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Raises InvalidRequestError for an id out of the vocabulary."""
        tokenizer = self._need_tokenizer()
        return tokenizer.decode(
            self._checked_ids(token_ids, "tokens"), skip_special_tokens=skip_special_tokens
        )

    def prompt_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, which may be given as such. Raises InvalidRequestError."""
        if not isinstance(prompt, str | Sequence):
            raise InvalidRequestError("a prompt must be text or a list of token ids", parameter="prompt")
        if not prompt:
            raise InvalidRequestError("the prompt is empty", parameter="prompt")
        if isinstance(prompt, str):
            prompt = self.tokenize(prompt)
        return self._checked_ids(prompt, "prompt")

    def chat_tokens(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, by the model's chat template (see ChatTemplate.render).

        Raises InvalidRequestError, and RequestTooLargeError as ``tokenize`` does, here before rendering.
        """
        if self._template is None:
            raise InvalidRequestError(
                f"model {self.model.name} has no chat template; use /v1/completions", parameter="messages"
            )
        normal = normalise_messages(messages)
        # Characters, of which there are no more than bytes.
        self._check_text_size(sum(len(message.get("content") or "") for message in normal), "messages")
        text = self._template.render(
            normal, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )
        # The template writes the special tokens itself.
        token_ids = self.tokenize(text, add_special_tokens=False)
        if not token_ids:
            raise InvalidRequestError("the chat template makes an empty prompt", parameter="messages")
        return self._checked_ids(token_ids, "messages")

    def submit(
        self,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        new_id: Callable[[], RequestId],
        generator: random.Random,
        tenant: bytes = b"",
    ) -> Submission:
        """The requests for one prompt: ``params.n`` of them.

        ``new_id`` gives each request its id, ``generator`` the seed where the client gave none; see Request
        for ``tenant``. Raises InvalidRequestError and RequestTooLargeError.
        """
        self._check_stops(params)
        max_tokens = self._max_tokens(len(prompt_token_ids), params)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        seed = generator.getrandbits(63) if params.seed is None else params.seed
        requests = tuple(
            Request(
                id=new_id(),
                model=self.model.index,
                prompt_token_ids=prompt_token_ids,
                sampling=params,
                max_tokens=max_tokens,
                seed=child_seed(seed, i),
                stop_token_ids=frozenset((*eos, *params.stop_token_ids)),
                arrival=Nanoseconds(0),
                tenant=tenant,
            )
            for i in range(params.n)
        )
        stop_strings = StopStrings(params.stop) if params.stop else None
        return Submission(self.model, prompt_token_ids, requests, self.tokenizer, stop_strings)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                f"model {self.model.name} has no tokenizer: its prompts must be token ids", parameter="prompt"
            )
        return self.tokenizer

    def _check_text_size(self, size: int, parameter: str) -> None:
        """Encoding takes time and memory in proportion to a text, so a hopeless one is not begun with."""
        most = self.model.longest * self._need_tokenizer().longest_token_bytes
        if size > most:
            raise RequestTooLargeError(
                f"a text of {size} bytes is too long: prompt and output of {self.model.name} have at most "
                f"{self.model.longest} tokens, which are {most} bytes at the very most",
                parameter=parameter,
            )

    def _checked_ids(self, token_ids: Sequence[int], parameter: str) -> tuple[int, ...]:
        vocab_size = self.model.vocab_size
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"token id {token!r} is not in the vocabulary of {self.model.name}, "
                    f"which has {vocab_size} tokens",
                    parameter=parameter,
                )
        return tuple(token_ids)

    def _check_stops(self, params: SamplingParams) -> None:
        self._checked_ids(params.stop_token_ids, "stop_token_ids")
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(
                f"model {self.model.name} has no tokenizer: there is no text to find stop strings in",
                parameter="stop",
            )

    def _max_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        """How many tokens may be generated: as asked, or all that context and KV pool leave."""
        self.model.check_length(prompt_tokens, params.max_tokens or max(1, params.min_tokens))
        return params.max_tokens or self.model.longest - prompt_tokens


def child_seed(seed: int, index: int) -> int:
    """The seed of choice ``index``: the seed itself for the first, then independent ones below 2**63."""
    if index == 0:
        return seed
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
