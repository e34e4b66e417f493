"""Loads for the tests of the load generator."""

from __future__ import annotations

from typing import Any

from crosspool.bench.prompts import Span
from crosspool.bench.run import Load


def small_load(*models: str, **fields: Any) -> Load:
    """Two streams of three requests, each of 8 prompt tokens and 6 output tokens, or as ``fields`` say."""
    defaults: dict[str, Any] = {"duration": None, "rate": None, "timeout": 20.0}
    defaults |= {"requests": None if "duration" in fields else 3}
    defaults |= {"concurrency": None if "rate" in fields else 2}
    defaults |= {"prompt_tokens": Span(8, 8), "output_tokens": Span(6, 6)}
    return Load(models=models, **(defaults | fields))
