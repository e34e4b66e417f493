"""Engine outputs to text deltas: stop tokens, stop strings, logprobs, counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import EngineOutput, FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.text.output import OutputAssembler
from crosspool.text.stop import StopStrings
from crosspool.text.tokenizer import load_tokenizer
from helpers_engine import logprobs_of
from helpers_tokenizers import byte_level, save

pytestmark = pytest.mark.unit

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save(byte_level(), tmp_path_factory.mktemp("tokenizer")))


def request_for(params, stop_token_ids=(EOS,)):
    stops = frozenset((*stop_token_ids, *params.stop_token_ids))
    return Request(RequestId(7), ModelIndex(0), (5, 6), params, 50, 0, stops, Nanoseconds(0))


def assembler(tokenizer, index=0, **params):
    given = SamplingParams(max_tokens=None, **params)
    stops = StopStrings(given.stop) if given.stop else None
    return OutputAssembler(request_for(given), tokenizer, stops, index=index)


def output(tokens, finish=None, **kwargs):
    return EngineOutput(RequestId(7), tuple(tokens), finish_reason=finish, **kwargs)


def letters(tokenizer, text):
    """One token per byte."""
    return [tokenizer.encode(character, add_special_tokens=False)[0] for character in text]


def test_text_and_counts(tokenizer):
    ids = letters(tokenizer, "abc")
    front = assembler(tokenizer, index=3)
    first = front.feed(output(ids[:2]))
    assert (first.index, first.text, first.token_ids) == (3, "ab", tuple(ids[:2]))
    assert (first.prompt_tokens, first.output_tokens, first.finish_reason) == (2, 2, None)
    assert not front.finished
    last = front.feed(output(ids[2:], FinishReason.LENGTH))
    assert (last.text, last.output_tokens, last.finish_reason) == ("c", 3, FinishReason.LENGTH)
    assert last.stop_reason is None
    assert last.logprobs is None
    assert front.finished
    assert front.finish_at is None


def test_the_stop_token_counts_but_is_no_text(tokenizer):
    a, b = letters(tokenizer, "ab")
    for stop_token, reason in ((EOS, None), (b, b)):
        front = assembler(tokenizer, stop_token_ids=(b,), skip_special_tokens=False)
        delta = front.feed(output([a, stop_token], FinishReason.STOP))
        assert (delta.text, delta.token_ids, delta.output_tokens) == ("a", (a, stop_token), 2)
        assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, reason)


def test_the_stop_token_is_text_when_asked_for(tokenizer):
    a, b = letters(tokenizer, "ab")
    front = assembler(tokenizer, stop_token_ids=(b,), include_stop_str_in_output=True)
    assert front.feed(output([a, b], FinishReason.STOP)).text == "ab"
    front = assembler(tokenizer, include_stop_str_in_output=True, skip_special_tokens=False)
    assert front.feed(output([a, EOS], FinishReason.STOP)).text == "a</s>"


def test_an_eos_that_did_not_stop_is_text_unless_skipped(tokenizer):
    a, b = letters(tokenizer, "ab")
    front = assembler(tokenizer, skip_special_tokens=False)
    assert front.feed(output([a, EOS, b], FinishReason.LENGTH)).text == "a</s>b"


def test_a_stop_string_across_outputs(tokenizer):
    ids = letters(tokenizer, "so END and")
    front = assembler(tokenizer, stop=("END",))
    assert front.feed(output(ids[:4])).text == "so "
    assert front.feed(output(ids[4:5])).text == ""
    delta = front.feed(output(ids[5:]))
    assert delta.text == ""
    assert delta.token_ids == tuple(ids[5:6])
    assert (delta.output_tokens, front.finish_at) == (6, 6)
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, "END")
    assert front.finished


def test_a_stop_string_that_does_not_come_is_shown(tokenizer):
    ids = letters(tokenizer, "the EN")
    front = assembler(tokenizer, stop=("END",))
    assert front.feed(output(ids)).text == "the "
    delta = front.feed(output([], FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason) == ("EN", FinishReason.LENGTH)


def test_the_stop_string_is_text_when_asked_for(tokenizer):
    front = assembler(tokenizer, stop=("END",), include_stop_str_in_output=True)
    assert front.feed(output(letters(tokenizer, "so END and"))).text == "so END"


def test_a_stop_string_in_the_engines_last_output_needs_no_finish(tokenizer):
    front = assembler(tokenizer, stop=("b",))
    delta = front.feed(output(letters(tokenizer, "abc"), FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "b")
    assert front.finish_at is None


def test_the_first_min_tokens_complete_no_stop_string(tokenizer):
    ids = letters(tokenizer, "aabab")
    for stop, shown in (("b", "aaba"), ("ab", "aab")):
        front = assembler(tokenizer, stop=(stop,), min_tokens=3)
        delta = front.feed(output(ids))
        assert (delta.text, front.finish_at) == (shown, 5)


def test_half_a_character_at_the_end(tokenizer):
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    front = assembler(tokenizer)
    assert front.feed(output(ids[:1])).text == ""
    assert front.feed(output(ids[1:2], FinishReason.LENGTH)).text == "\ufffd"


def test_logprobs_have_text_and_bytes(tokenizer):
    fox = tokenizer.encode("🦊", add_special_tokens=False)
    front = assembler(tokenizer, logprobs=2)
    delta = front.feed(output(fox[:1], logprobs=(logprobs_of(fox[0], 2),)))
    (entry,) = delta.logprobs
    assert (entry.chosen.token_id, entry.chosen.logprob, entry.rank) == (fox[0], -fox[0] / 10, 1)
    assert "🦊".encode().startswith(entry.chosen.bytes)
    assert (entry.chosen.text, len(entry.chosen.bytes) < 4) == ("\ufffd", True)
    assert [chance.token_id for chance in entry.top] == [fox[0], fox[0] + 1]
    assert entry.top[1].bytes == tokenizer.token_bytes(fox[0] + 1)


def test_logprobs_end_with_the_stop_string(tokenizer):
    ids = letters(tokenizer, "abc")
    front = assembler(tokenizer, stop=("b",), logprobs=0)
    delta = front.feed(output(ids, logprobs=tuple(logprobs_of(token, 0) for token in ids)))
    assert [entry.chosen.text for entry in delta.logprobs] == ["a", "b"]


def test_without_a_tokenizer_there_is_no_text():
    front = assembler(None, logprobs=1)
    delta = front.feed(output([4, EOS], FinishReason.STOP, logprobs=(logprobs_of(4, 1), logprobs_of(1, 1))))
    assert (delta.text, delta.token_ids) == ("", (4, EOS))
    assert delta.logprobs[0].chosen.bytes == b""


def test_an_error_is_passed_on(tokenizer):
    delta = assembler(tokenizer).feed(output([], FinishReason.ERROR, error="the worker failed"))
    assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, "the worker failed")


@given(data=st.data())
def test_how_the_engine_cuts_its_outputs_changes_nothing(tokenizer, data):
    ids = letters(tokenizer, data.draw(st.text("abé🦊", max_size=20)))
    stops = tuple(data.draw(st.lists(st.text("abé", min_size=1, max_size=3), max_size=2)))
    size = data.draw(st.integers(1, 5))

    def run(step):
        front = assembler(tokenizer, stop=stops)
        outputs = [output(ids[start : start + step]) for start in range(0, len(ids), step)]
        outputs.append(output([], FinishReason.LENGTH))
        deltas = [front.feed(one) for one in outputs if not front.finished]
        tokens = [token for delta in deltas for token in delta.token_ids]
        return (
            "".join(delta.text for delta in deltas),
            tokens,
            deltas[-1].stop_reason,
            deltas[-1].finish_reason,
        )

    assert run(size) == run(1)
