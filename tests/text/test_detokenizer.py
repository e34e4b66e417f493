"""Incremental detokenizing against decoding all at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspool.text.detokenizer import Detokenizer
from crosspool.text.tokenizer import load_tokenizer
from helpers_tokenizers import byte_fallback, byte_level, save

pytestmark = pytest.mark.unit

MAKERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(save(MAKERS[request.param](), tmp_path_factory.mktemp(request.param)))


def deltas(tokenizer, ids, prompt=(), skip=True):
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


@given(data=st.data(), skip=st.booleans())
def test_deltas_of_any_ids_add_up_to_the_whole(tokenizer, data, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=60))
    assert "".join(deltas(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40))
def test_text_never_shows_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = deltas(tokenizer, ids)
    assert parts[-1] == ""
    shown = ""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for part in parts:
        shown += part
        assert whole.startswith(shown)
    assert shown == whole


@given(before=st.text(max_size=20), after=st.text(max_size=20))
def test_deltas_continue_the_prompt(tokenizer, before, after):
    """Cut anywhere between tokens where the prompt ends with a whole character."""
    prompt = tokenizer.encode(before, add_special_tokens=True)
    ids = tokenizer.encode(after, add_special_tokens=False)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    assert start + "".join(deltas(tokenizer, ids, prompt)) == whole


def test_every_token_of_an_emoji_but_the_last_is_silent(tokenizer):
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) >= 3
    parts = [part for part in deltas(tokenizer, ids) if part]
    assert parts == ["🦊"]


def test_a_tail_that_is_no_character_becomes_one_replacement(tokenizer):
    ids = tokenizer.encode("🦊", add_special_tokens=False)[:-1]
    parts = deltas(tokenizer, ids)
    assert "".join(parts[:-1]) == ""
    assert parts[-1] == "\ufffd"


def test_a_special_token_inside_a_character_is_passed_over_or_breaks_it(tokenizer):
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    eos = next(i for i in sorted(tokenizer.special_ids) if tokenizer.token_bytes(i) == b"</s>")
    broken = [*ids[:-1], eos, ids[-1]]
    assert "".join(deltas(tokenizer, broken)) == "🦊"
    assert "".join(deltas(tokenizer, broken, skip=False)) == "\ufffd</s>\ufffd"


def test_only_the_beginning_of_a_text_loses_its_space(tmp_path):
    tokenizer = load_tokenizer(save(byte_fallback(), tmp_path))
    the = tokenizer.encode("the", add_special_tokens=False)
    assert "".join(deltas(tokenizer, the + the)) == "the the"
    assert "".join(deltas(tokenizer, the, prompt=the)) == " the"
    bos = [1]
    assert "".join(deltas(tokenizer, the, prompt=bos)) == "the"
    assert "".join(deltas(tokenizer, the, prompt=bos, skip=False)) == " the"
