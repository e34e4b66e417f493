"""Seeded random prompts of given lengths. No two are alike, so that no server can reuse an old one."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from crosspool.core.errors import ConfigError

_RANGE = re.compile(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?")

# Frequent words, which most tokenizers have as one token each with the space before.
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"),
    *("state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week"),
    *("company", "system", "question", "work", "government", "number", "night", "point", "home", "water"),
    *("room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye"),
    *("job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father"),
    *("power", "hour", "game", "line", "end", "member", "law", "car", "city", "name"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """Whole numbers from ``low`` to ``high``, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, *, least: int) -> Span:
        """``512`` or ``128-1024``. Raises ConfigError for anything else and for numbers below ``least``."""
        match = _RANGE.fullmatch(text)
        span = None if match is None else cls(int(match[1]), int(match[2] or match[1]))
        if span is None or not least <= span.low <= span.high:
            raise ConfigError(f"{text!r} is neither a number from {least} nor a range such as 128-1024")
        return span

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


TOKEN_IDS = Span(100, 20_000)
"""In the usual vocabularies: ordinary words, no special tokens."""


def random_token_ids(rng: random.Random, tokens: int, ids: Span) -> list[int]:
    return rng.choices(range(ids.low, ids.high + 1), k=tokens)


def random_text(rng: random.Random, tokens: int) -> str:
    """So many words, which is about as many tokens: the server's count is the one to report."""
    return " ".join(rng.choices(WORDS, k=tokens))
