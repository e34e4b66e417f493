"""Frames in the pipes between the API process and the cell: pieces of messages, and lone tokens.

A pipe takes up to PIPE_BUF bytes whole or not at all (pipe(7)), so several writers may share it if each
frame is no larger: those of a message come in order, with tokens between them perhaps. A token's frame is its
record (core/token_record.py). Others are two int64, PIECE or LAST_PIECE and a number of bytes, and the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from select import PIPE_BUF

from crosspool.core.token_record import RECORD_WORDS, TOKEN_RECORD

PIECE = TOKEN_RECORD + 1
LAST_PIECE = TOKEN_RECORD + 2

_RECORD = struct.Struct(f"={RECORD_WORDS}q")
_HEADER = struct.Struct("=2q")
_MOST = PIPE_BUF - _HEADER.size

Frame = tuple[int, int] | bytes
"""A token's request and id, or a message."""


def cut(message: bytes) -> Iterator[bytes]:
    """A message as frames."""
    for begin in range(0, max(1, len(message)), _MOST):
        piece = message[begin : begin + _MOST]
        kind = LAST_PIECE if begin + _MOST >= len(message) else PIECE
        yield _HEADER.pack(kind, len(piece)) + piece


class FrameReader:
    """Puts together again what one pipe carries."""

    def __init__(self) -> None:
        self._bytes = b""
        self._message = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The tokens and messages that are whole with these bytes. Raises ValueError for what is no frame."""
        data, place = self._bytes + data, 0
        found: list[Frame] = []
        while len(data) - place >= _HEADER.size:
            kind, number = _HEADER.unpack_from(data, place)
            size = _RECORD.size if kind == TOKEN_RECORD else _HEADER.size + number
            if not (kind in (TOKEN_RECORD, PIECE, LAST_PIECE) and _HEADER.size <= size <= PIPE_BUF):
                raise ValueError(f"a frame of kind {kind} and {number} bytes")
            if len(data) - place < size:
                break
            if kind == TOKEN_RECORD:
                _, request, token = _RECORD.unpack_from(data, place)
                found.append((request, token))
            else:
                self._message += data[place + _HEADER.size : place + size]
                if kind == LAST_PIECE:
                    found.append(bytes(self._message))
                    self._message.clear()
            place += size
        self._bytes = data[place:]
        return found
