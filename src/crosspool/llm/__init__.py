"""Python's door: LLM (blocking, an engine in this process) and AsyncLLM (streams, any engine)."""

from crosspool.llm.async_llm import AsyncLLM
from crosspool.llm.llm import LLM
from crosspool.llm.outputs import CompletionOutput, RequestOutput
from crosspool.text.front import Submission
from crosspool.text.output import OutputLogprobs, TextDelta, TokenChance

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "OutputLogprobs",
    "RequestOutput",
    "Submission",
    "TextDelta",
    "TokenChance",
]
