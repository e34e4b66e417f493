"""Tokens into the pipe of Executor.stream_to, the moment the host reads them from a ring."""

from __future__ import annotations

import os
import struct

from crosspool.core.token_record import RECORD_WORDS, TOKEN_RECORD

_RECORD = struct.Struct(f"={RECORD_WORDS}q")


class TokenPipe:
    """Nobody's, until ``to`` names a file descriptor."""

    def __init__(self) -> None:
        self.to: int | None = None

    def take(self, request: int, token: int) -> bool:
        """Whether the pipe has taken the token: whole or not at all."""
        if self.to is None:
            return False
        try:
            return os.write(self.to, _RECORD.pack(TOKEN_RECORD, request, token)) == _RECORD.size
        except OSError:
            return False
