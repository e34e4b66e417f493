"""Log probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Iterable

from crosspool.llm import OutputLogprobs, TokenChance
from crosspool.server.openai_responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob


def chat_logprobs(tokens: Iterable[OutputLogprobs]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token.chosen.text,
                logprob=token.chosen.logprob,
                bytes=list(token.chosen.bytes),
                top_logprobs=[_top_logprob(chance) for chance in token.top],
            )
            for token in tokens
        ]
    )


def completion_logprobs(tokens: Iterable[OutputLogprobs], offset: int = 0) -> CompletionLogprobs:
    """``offset`` is how many characters the tokens before have.

    The alternatives of a token always include the token itself. Of tokens that read the same (parts of
    characters do) only the most probable is told.
    """
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in tokens:
        alternatives: dict[str, float] = {}
        for chance in (*token.top, token.chosen):
            alternatives.setdefault(chance.text, chance.logprob)
        result.tokens.append(token.chosen.text)
        result.token_logprobs.append(token.chosen.logprob)
        result.top_logprobs.append(alternatives)
        result.text_offset.append(offset)
        offset += characters_begun(token.chosen.bytes)
    return result


def characters_begun(content: bytes) -> int:
    """How many characters begin in these bytes of UTF-8: those that are no continuation bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in content)


def _top_logprob(chance: TokenChance) -> TopLogprob:
    return TopLogprob(token=chance.text, logprob=chance.logprob, bytes=list(chance.bytes))
