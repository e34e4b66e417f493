"""Token ids to text, one by one, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from crosspool.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence as it grows, in constant time per token.

    The deltas continue the text of ``prompt``: together with it they are what ``Tokenizer.decode`` makes of
    prompt and output, except that a character is not completed across that border. Bytes are held back until
    their character is complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._incomplete = b""
        begun = any(tokenizer.token_bytes(token) for token in prompt if token not in self._skipped)
        self._leading_spaces = 0 if begun else tokenizer.leading_spaces

    def feed(self, token_id: int) -> str:
        """The text that this token completes, which may be empty."""
        if token_id in self._skipped:
            return ""
        content = self._incomplete + self._tokenizer.token_bytes(token_id)
        text, complete = codecs.utf_8_decode(content, "replace", False)
        self._incomplete = content[complete:]
        return self._without_leading_spaces(text) if self._leading_spaces else text

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character never became complete, else nothing."""
        content, self._incomplete = self._incomplete, b""
        return self._without_leading_spaces(content.decode("utf-8", "replace"))

    def _without_leading_spaces(self, text: str) -> str:
        while text and self._leading_spaces:
            if not text.startswith(" "):
                self._leading_spaces = 0
                break
            self._leading_spaces -= 1
            text = text[1:]
        return text
