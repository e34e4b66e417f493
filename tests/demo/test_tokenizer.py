from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from crosspool.demo.tokenizer import tokenizer

pytestmark = pytest.mark.unit

SPECIAL = ["<|end|>", "<|start|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]


@pytest.fixture(scope="module")
def built() -> Tokenizer:
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *merged]
    return Tokenizer.from_str(json.dumps(tokenizer(tokens, MERGES, list(enumerate(SPECIAL)))))


def test_merges_and_leading_spaces(built: Tokenizer) -> None:
    assert built.encode("hello hello").tokens == ["hello", "Ġhello"]


def test_digits_stand_alone_even_where_a_merge_would_join_them(built: Tokenizer) -> None:
    assert built.encode("12").tokens == ["1", "2"]


def test_a_special_token_is_one_id_and_is_skipped_in_text(built: Tokenizer) -> None:
    ids = built.encode("<|start|>hello<|end|>").ids
    assert ids[0] == 1
    assert ids[-1] == 0
    assert built.decode(ids) == "hello"
    assert built.decode(ids, skip_special_tokens=False) == "<|start|>hello<|end|>"


@pytest.mark.parametrize("text", ["", " ", "  two  spaces\n", "1,234.5", "naïve café", "日本語 🙂", "\t\x00"])
def test_any_text_comes_back(built: Tokenizer, text: str) -> None:
    assert built.decode(built.encode(text).ids) == text
