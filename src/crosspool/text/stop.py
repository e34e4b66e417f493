"""Stop strings: found in a stream of text, wherever its pieces begin and end.

An Aho-Corasick automaton (Aho and Corasick, CACM 18(6), 1975): after each character its state is the
longest end of the text that begins some stop string. The state's depth is therefore exactly how much text
must be held back, and the cost per character does not depend on the number or the length of the stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0


class StopStrings:
    """The automaton for a set of stop strings. Immutable once made, so requests may share it."""

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise ValueError("a stop string is empty")
        self._next: list[dict[str, int]] = [{}]
        self._fail: list[int] = [ROOT]
        self._depth: list[int] = [0]
        self._match: list[str | None] = [None]
        for string in strings:
            self._insert(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character. Amortised constant time."""
        while state != ROOT and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, ROOT)

    def depth(self, state: int) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        return self._depth[state]

    def match(self, state: int) -> str | None:
        """The longest stop string that ends here."""
        return self._match[state]

    def _insert(self, string: str) -> None:
        state = ROOT
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(ROOT)
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = self._next[state][character]
        self._match[state] = string

    def _link(self) -> None:
        """Breadth first, so that a state's shorter suffixes are linked before it."""
        queue = deque(self._next[ROOT].values())
        while queue:
            state = queue.popleft()
            self._match[state] = self._match[state] or self._match[self._fail[state]]
            for character, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], character)
                queue.append(child)


@dataclass(frozen=True, slots=True)
class Matched:
    """``text`` may be shown now. ``stop`` is the stop string that has just been completed, if any."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Looks for stop strings in one growing text.

    The match that is complete first ends the text; of those complete at the same character the one that began
    first. ``include_stop`` leaves the stop string in the text.
    """

    def __init__(self, strings: StopStrings, *, include_stop: bool = False) -> None:
        self._strings = strings
        self._include_stop = include_stop
        self._state = ROOT
        self._held = ""

    def feed(self, text: str) -> Matched:
        """Take the next piece of text. After a match nothing more may be fed."""
        before = self._held + text
        for i, character in enumerate(text, start=len(self._held) + 1):
            self._state = self._strings.step(self._state, character)
            stop = self._strings.match(self._state)
            if stop is not None:
                self._held = ""
                return Matched(before[: i if self._include_stop else i - len(stop)], stop)
        shown = len(before) - self._strings.depth(self._state)
        self._held = before[shown:]
        return Matched(before[:shown])

    def finish(self) -> str:
        """The text held back, now that no more will come."""
        held, self._held = self._held, ""
        return held
