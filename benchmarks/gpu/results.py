"""What a section measures. Standard library only: the process that collects results imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


class NotMeasured(Exception):  # noqa: N818 - it is no error
    """Why a figure cannot be had here."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. ``target`` None: it is only reported."""

    name: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = True

    @property
    def short(self) -> bool:
        """Whether it misses its target. What is not a number does."""
        if self.target is None:
            return False
        return not (self.value >= self.target if self.at_least else self.value <= self.target)

    @property
    def line(self) -> str:
        text = f"{self.name:<44} {self.value:>12.4g} {self.unit:<8}"
        if self.target is None:
            return text.rstrip()
        sign = ">=" if self.at_least else "<="
        return f"{text} {sign} {self.target:g}{'   SHORT' if self.short else ''}"


def at_most(name: str, value: float, unit: str, target: float) -> Figure:
    return Figure(name, value, unit, target, at_least=False)


@dataclass(frozen=True, slots=True)
class Case:
    """What is run by itself: if it fails, the others go on. After ``limit`` seconds it counts as hung."""

    name: str
    run: Callable[[], Sequence[Figure]]
    limit: float = 60.0


DONE, FAILED, NOT_MEASURED = "done", "failed", "not measured"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case. ``reason`` is why it has no figures, ``details`` a traceback or what a
    process that died has said."""

    section: str
    case: str
    status: str
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    reason: str = ""
    details: str = ""

    @staticmethod
    def of(plain: dict[str, Any]) -> Outcome:
        """From ``plain()``."""
        figures = tuple(Figure(**figure) for figure in plain["figures"])
        return Outcome(**{**plain, "figures": figures})

    def plain(self) -> dict[str, Any]:
        return asdict(self)
