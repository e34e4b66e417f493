from __future__ import annotations

import pytest

from crosspool.llm import OutputLogprobs, TokenChance
from crosspool.server.logprobs import characters_begun, chat_logprobs, completion_logprobs

pytestmark = pytest.mark.unit


def chance(token: int, logprob: float, content: bytes) -> TokenChance:
    return TokenChance(token, logprob, content.decode("utf-8", "replace"), content)


TOKENS = [
    OutputLogprobs(chance(1, -2.0, "é".encode()), 3, (chance(2, -0.1, b"\xc3"), chance(3, -0.2, b"\xa9"))),
    OutputLogprobs(chance(4, -0.3, b" ok"), 1, (chance(4, -0.3, b" ok"),)),
]


def test_chat_reports_bytes_and_as_many_alternatives_as_were_asked_for() -> None:
    first, second = chat_logprobs(TOKENS).content
    assert (first.token, first.logprob, first.bytes) == ("é", -2.0, [0xC3, 0xA9])
    assert [(top.token, top.logprob, top.bytes) for top in first.top_logprobs] == [
        ("�", -0.1, [0xC3]),
        ("�", -0.2, [0xA9]),
    ]
    assert [top.token for top in second.top_logprobs] == [" ok"]


def test_completions_report_the_chosen_token_among_its_alternatives() -> None:
    result = completion_logprobs(TOKENS, offset=10)
    assert result.tokens == ["é", " ok"]
    assert result.token_logprobs == [-2.0, -0.3]
    assert result.top_logprobs == [{"�": -0.1, "é": -2.0}, {" ok": -0.3}]
    assert result.text_offset == [10, 11]


@pytest.mark.parametrize(
    ("content", "characters"), [(b"", 0), (b"abc", 3), ("日本".encode(), 2), (b"\xe6\x97", 1), (b"\xa5", 0)]
)
def test_a_character_is_counted_where_it_begins(content: bytes, characters: int) -> None:
    assert characters_begun(content) == characters
