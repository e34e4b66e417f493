"""Runs sections one after another, each in a process of its own, and collects what they say.

A section's time is its share of what is left, so what one does not use goes to those after it. A process that
dies, or says nothing for too long, costs the case that it was at: the next one goes on after that.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu.report import Report
from gpu.results import FAILED, NOT_MEASURED, Outcome

ROOT = Path(__file__).resolve().parents[2]

SECTIONS = {
    "card": 20,
    "kernels": 100,
    "graphs": 20,
    "doorbell": 15,
    "ffn": 75,
    "attention": 65,
    "decode": 225,
    "sharing": 115,
}
"""In their order, with the seconds that each is expected to take: its share of what is left."""

NO_GPU = 2
LEAST = 5.0
"""Seconds with which a process is still begun."""


@dataclass
class Session:
    """One process's part of a section: how many cases are behind it, and what it was at when it ended."""

    section: str
    skip: int
    begun: str | None = None
    limit: float = 0.0
    complete: bool = False
    status: int | None = None
    hung: bool = False
    errors: str = ""
    done: int = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.skip


class Runner:
    """``command`` starts a section's process, which is given the section and options of gpu/child.py."""

    def __init__(self, report: Report, command: Sequence[str], seconds: float) -> None:
        self._report = report
        self._command = command
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def run(self, sections: Sequence[str]) -> int | None:
        """Returns NO_GPU as soon as a process says so."""
        for number, section in enumerate(sections):
            weights = [SECTIONS[other] for other in sections[number:]]
            end = time.monotonic() + max(0.0, self.left) * weights[0] / sum(weights)
            if self._section(section, end) == NO_GPU:
                return NO_GPU
        return None

    def _section(self, section: str, end: float) -> int | None:
        skip = 0
        while True:
            left = end - time.monotonic()
            if left < LEAST:
                self._report.add(Outcome(section, "the rest", NOT_MEASURED, reason="no time was left"))
                return None
            session = self._session(section, skip, left)
            if session.status == NO_GPU:
                print(session.errors, file=sys.stderr)
                return NO_GPU
            if session.complete:
                return None
            if session.begun is not None:
                self._report.add(_lost(session))
                session.done += 1
            elif session.done == skip:
                reason = f"its process ended with status {session.status}"
                self._report.add(Outcome(section, "its begin", FAILED, reason=reason, details=session.errors))
                return None
            skip = session.done

    def _session(self, section: str, skip: int, seconds: float) -> Session:
        session = Session(section, skip)
        options = [section, "--skip", str(skip), "--seconds", f"{seconds:.1f}"]
        with tempfile.TemporaryFile("w+") as errors:
            how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
            process = subprocess.Popen([*self._command, *options], env=_environment(), **how)
            assert process.stdout is not None
            lines, reader = _lines(process.stdout)
            try:
                self._listen(session, lines, time.monotonic() + seconds)
                if session.hung:
                    process.kill()
                session.status = process.wait()
            finally:
                process.kill()
                reader.join()
                process.stdout.close()
            errors.seek(0)
            session.errors = errors.read()[-4000:]
        return session

    def _listen(self, session: Session, lines: queue.Queue[str | None], end: float) -> None:
        """What the process says, until it ends or has said nothing for too long."""
        silence = 120.0
        while True:
            try:
                # A case that has begun may end, but never later than the whole.
                wait = max(1.0, min(silence, max(end - time.monotonic(), self.left - 2)))
                line = lines.get(timeout=min(wait, max(1.0, self.left)))
            except queue.Empty:
                session.hung, session.limit = True, silence
                return
            if line is None:
                return
            said = _parsed(line)
            if "begin" in said:
                session.begun, silence = said["begin"], said["limit"]
            elif "about" in said:
                self._report.about = said["about"]
            elif "end" in said:
                session.complete = True
                silence = 30.0
            elif "status" in said:
                self._report.add(Outcome.of(said))
                session.begun, session.done, silence = None, session.done + 1, 120.0


def _lost(session: Session) -> Outcome:
    reason = (
        f"it said nothing for {session.limit:.0f} s, or time was over"
        if session.hung
        else f"its process ended with status {session.status}"
    )
    assert session.begun is not None
    return Outcome(session.section, session.begun, FAILED, reason=reason, details=session.errors)


def _parsed(line: str) -> dict[str, Any]:
    """A line of somebody else's, such as a library's warning, says nothing."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _lines(source: IO[str]) -> tuple[queue.Queue[str | None], threading.Thread]:
    """Lines as they come, then None; and the thread that reads them."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in source:
            lines.put(line)
        lines.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return lines, thread


def _environment() -> dict[str, str]:
    folders = [str(ROOT / name) for name in ("src", "benchmarks", "tests")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


def main(description: str | None) -> int:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="may be given several times")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--interpret", action="store_true", help="on the CPU, to try this code")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1" if options.interpret else "0"
    command = [sys.executable, "-m", "gpu.child", *(["--interpret"] if options.interpret else [])]
    report = Report(options.json, interpreted=options.interpret)
    sections = [name for name in SECTIONS if not options.only or name in options.only]
    if Runner(report, command, options.seconds).run(sections) == NO_GPU:
        return NO_GPU
    return report.finish()
