"""Renders chat templates in a process that can be killed, whatever the template does."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosspool.core.errors import InvalidRequestError

WORKER = Path(__file__).with_name("template_worker.py")
MEBIBYTE = 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may cost. ``memory_bytes`` is address space, the interpreter's own included."""

    seconds: int = 5
    memory_bytes: int = 512 * MEBIBYTE
    max_characters: int = 8 * MEBIBYTE


class TemplateProcess:
    """One worker process, started at the first rendering and again after each that had to be killed.

    ``render`` blocks, one rendering at a time; it may be called from any thread.
    """

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self._limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Raises InvalidRequestError with the template's message if it refuses these variables, and with a
        general one if it fails or goes beyond its limits; the log then says more.
        """
        try:
            payload = json.dumps({"template": template, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError):
            raise InvalidRequestError("the messages are not plain JSON data", parameter="messages") from None
        with self._lock:
            answer = self._exchange(payload)
        if "text" in answer:
            return answer["text"]
        if "error" in answer:
            raise InvalidRequestError(
                f"the chat template refuses the messages: {answer['error']}", parameter="messages"
            )
        logger.warning("a chat template failed: %s", answer["failure"])
        raise InvalidRequestError("the chat template cannot render these messages", parameter="messages")

    def close(self) -> None:
        """End the worker process. A later ``render`` starts another."""
        with self._lock:
            self._stop()

    def _exchange(self, payload: bytes) -> dict[str, str]:
        process = self._started()
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            process.kill()

        # The end of the process ends the blocking read; a deadline also covers waits that use no CPU time.
        deadline = threading.Timer(self._limits.seconds, kill)
        deadline.start()
        body = b""
        try:
            body = _converse(process, payload)
        finally:
            deadline.cancel()
            deadline.join()
            if not body or expired.is_set():
                self._stop()
        if not body:
            return {"failure": f"stopped after {self._limits.seconds} s or for want of memory"}
        answer: dict[str, str] = json.loads(body)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None:
            limits = (self._limits.memory_bytes, self._limits.seconds, self._limits.max_characters)
            self._process = subprocess.Popen(
                # -P: the folder of the script is no place to import from.
                [sys.executable, "-P", str(WORKER), *map(str, limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            with suppress(BrokenPipeError), process:
                pass


def _converse(process: subprocess.Popen[bytes], payload: bytes) -> bytes:
    """Send one frame and receive one; empty if the process ended instead."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(struct.pack(">I", len(payload)) + payload)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    header = process.stdout.read(4)
    return process.stdout.read(struct.unpack(">I", header)[0]) if len(header) == 4 else b""
