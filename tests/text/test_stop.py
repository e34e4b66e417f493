"""Stop strings in a stream, against looking at the whole text after each character."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crosspool.text.stop import StopMatcher, StopStrings

pytestmark = pytest.mark.unit

WORDS = st.text("ab", min_size=1, max_size=5)


def naive(stops, text, include_stop):
    """(text shown in the end, stop string) by the definition: first complete, then longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def cut(text, borders):
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[a:b] for a, b in pairwise(places)]


def stream(stops, pieces, include_stop=False):
    """(pieces shown, stop string, number of pieces taken)."""
    matcher = StopMatcher(StopStrings(stops), include_stop=include_stop)
    shown = []
    for taken, piece in enumerate(pieces, start=1):
        matched = matcher.feed(piece)
        shown.append(matched.text)
        if matched.stop is not None:
            return shown, matched.stop, taken
    return [*shown, matcher.finish()], None, len(pieces)


@given(
    stops=st.lists(WORDS, min_size=1, max_size=4),
    text=st.text("abc", max_size=40),
    borders=st.lists(st.integers(0, 1000), max_size=20),
    include_stop=st.booleans(),
)
@example(stops=["abab", "b"], text="abab", borders=[], include_stop=False)
def test_equals_the_definition_wherever_the_text_is_cut(stops, text, borders, include_stop):
    pieces = cut(text, borders)
    shown, stop, taken = stream(stops, pieces, include_stop)
    expected, expected_stop = naive(stops, text, include_stop)
    assert ("".join(shown), stop) == (expected, expected_stop)
    if stop is not None:
        # It is said with the piece that completes it, neither later nor earlier.
        assert naive(stops, "".join(pieces[: taken - 1]), include_stop)[1] is None
        assert naive(stops, "".join(pieces[:taken]), include_stop)[1] == stop


@given(stops=st.lists(WORDS, min_size=1, max_size=4), text=st.text("abc", max_size=40))
def test_holds_back_exactly_what_may_become_a_stop_string(stops, text):
    matcher = StopMatcher(StopStrings(stops))
    shown = ""
    for end, character in enumerate(text, start=1):
        matched = matcher.feed(character)
        if matched.stop is not None:
            return
        shown += matched.text
        open_ends = [n for n in range(end + 1) if any(stop.startswith(text[end - n : end]) for stop in stops)]
        assert shown == text[: end - max(open_ends)]


def test_of_two_complete_at_once_the_longer_goes():
    assert stream(["\n", "x\n"], ["ax", "\n", "b"]) == (["a", ""], "x\n", 2)


def test_the_first_complete_wins_over_one_begun_earlier():
    assert stream(["abcd", "bc"], ["abcd"]) == (["a"], "bc", 1)


def test_text_after_the_match_is_dropped_also_when_it_is_included():
    assert stream(["END"], ["so EN", "D and on"], include_stop=True) == (["so ", "END"], "END", 2)


def test_a_begun_stop_string_is_shown_at_the_end():
    assert stream(["END"], ["the EN"]) == (["the ", "EN"], None, 1)


def test_empty_pieces_and_empty_stop_strings():
    assert stream(["a"], ["", "a"]) == (["", ""], "a", 2)
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_steps_are_linear_in_the_text():
    """The worst for a naive search: long stop strings that nearly match everywhere."""
    strings = StopStrings(["a" * 500 + "b", "a" * 300 + "c"])
    state, steps = 0, 0
    follow = strings.step

    class Counted(list):
        def __getitem__(self, index):
            nonlocal steps
            steps += 1
            return super().__getitem__(index)

    strings._next = Counted(strings._next)
    text = ("a" * 499 + "x") * 20
    for character in text:
        state = follow(state, character)
    assert steps <= 4 * len(text)
