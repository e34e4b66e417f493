"""Reading server-sent events in tests."""

from __future__ import annotations

import json
from typing import Any


def read_events(text: str) -> list[Any]:
    """The events of a whole stream, JSON decoded, ``[DONE]`` as it is."""
    assert text.endswith("\n\n"), f"the stream is cut off: {text[-100:]!r}"
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    contents = [block.removeprefix("data: ") for block in blocks]
    return [content if content == "[DONE]" else json.loads(content) for content in contents]
