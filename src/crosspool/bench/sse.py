"""Server-sent events, from bytes as they arrive."""

from __future__ import annotations


class EventLines:
    """Puts together the data of events. Only a newline ends a line, whatever else the text holds."""

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event whose line has come to its end with this chunk."""
        *lines, self._begun = (self._begun + chunk).split(b"\n")
        return [
            line.removeprefix(b"data:").removeprefix(b" ").removesuffix(b"\r")
            for line in lines
            if line.startswith(b"data:")
        ]
