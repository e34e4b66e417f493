"""What bytes a piece of a tokenizer's vocabulary stands for.

A ``tokenizer.json`` says in its section ``decoder`` how pieces become text. For the two kinds that
decoder-only models use, byte-level BPE and SentencePiece with byte fallback, that can be said piece by piece:
a text is the concatenation of its pieces' bytes, read as UTF-8, less a leading space in SentencePiece's case.
So a stream of tokens is detokenized exactly, in constant time per token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crosspool.core.errors import ModelLoadError

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's tokenizer).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """How pieces become bytes: ``replacements`` in order, then one of the two ways of writing bytes.

    ``leading_spaces`` is how many spaces at the very beginning of a text the tokenizer put there itself, and
    so do not belong to it.
    """

    replacements: tuple[tuple[str, str], ...] = ()
    byte_level: bool = False
    byte_fallback: bool = False
    leading_spaces: int = 0

    def piece_bytes(self, piece: str) -> bytes:
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        if self.byte_level:
            return _byte_level_bytes(piece)
        if self.byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.encode()


def piece_decoder(section: Mapping[str, Any] | None) -> PieceDecoder:
    """The PieceDecoder for the section ``decoder`` of a ``tokenizer.json``.

    Raises ModelLoadError for a decoder whose text is not a concatenation of its pieces'.
    """
    if section is None:
        raise ModelLoadError("its tokenizer.json has no decoder")
    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = joined = False
    leading_spaces = 0
    for step in _steps(section):
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not joined:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)} if not joined:
                replacements.append((old, " "))
                leading_spaces = 0 if _prepends_nothing(step) else 1
            case {"type": "ByteFallback"} if not joined:
                byte_fallback = True
            case {"type": "ByteLevel"} if not joined:
                byte_level = joined = True
            case {"type": "Fuse"}:
                joined = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if joined:
                leading_spaces = start
            case _:
                raise ModelLoadError(f"its tokenizer.json has a decoder step that is not supported: {step}")
    return PieceDecoder(tuple(replacements), byte_level, byte_fallback, leading_spaces)


def _byte_level_bytes(piece: str) -> bytes:
    """A piece with a character outside the alphabet is an added token, written as it is."""
    try:
        return bytes(BYTE_LEVEL_ALPHABET[character] for character in piece)
    except KeyError:
        return piece.encode()


def _steps(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if section.get("type") == "Sequence":
        for step in section["decoders"]:
            yield from _steps(step)
    else:
        yield section


def _prepends_nothing(metaspace: Mapping[str, Any]) -> bool:
    """Whether encoding puts no space before a text; older files say it with ``add_prefix_space``."""
    if "prepend_scheme" in metaspace:
        return bool(metaspace["prepend_scheme"] == "never")
    return not metaspace.get("add_prefix_space", True)
