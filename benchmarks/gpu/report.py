"""The table, as results come, and the JSON, which is whole after every case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu.results import DONE, FAILED, Outcome


class Report:
    """``about`` is the machine. Times of interpreted kernels are marked as meaningless."""

    def __init__(self, file: Path, *, interpreted: bool) -> None:
        self._file = file
        self._interpreted = interpreted
        self._outcomes: list[Outcome] = []
        self.about: dict[str, Any] = {}
        if interpreted:
            print("INTERPRETED, on the CPU: no time, rate or share below means anything")

    def add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        print(f"[{outcome.section}] {outcome.case} ({outcome.seconds:.1f} s)", flush=True)
        for figure in outcome.figures:
            print(f"    {figure.line}", flush=True)
        if outcome.status != DONE:
            print(f"    {outcome.status.upper()}: {outcome.reason}", flush=True)
        self._write()

    @property
    def short(self) -> list[str]:
        """What misses its target."""
        return [
            f"[{outcome.section}] {outcome.case}: {figure.line.removesuffix('SHORT').rstrip()}"
            for outcome in self._outcomes
            for figure in outcome.figures
            if figure.short
        ]

    @property
    def missing(self) -> list[str]:
        """What has not been measured, and why."""
        return [f"[{o.section}] {o.case}: {o.status}: {o.reason}" for o in self._outcomes if o.status != DONE]

    def finish(self) -> int:
        """Say what is short and what is missing. Returns 1 if some case failed, otherwise 0."""
        for title, lines in (("short of its target", self.short), ("not measured", self.missing)):
            print(f"\n{title}: {len(lines) or 'nothing'}")
            for line in lines:
                print(f"    {line}")
        print(f"\nwritten to {self._file}", file=sys.stderr)
        return int(any(outcome.status == FAILED for outcome in self._outcomes))

    def _write(self) -> None:
        whole = {
            "about": self.about,
            "interpreted": self._interpreted,
            "outcomes": [outcome.plain() for outcome in self._outcomes],
            "short": self.short,
            "not_measured": self.missing,
        }
        part = self._file.with_name(self._file.name + ".part")
        part.write_text(json.dumps(whole, indent=1))
        part.replace(self._file)
