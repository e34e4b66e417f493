"""CrossPool serves many mostly idle Mixture-of-Experts LLMs from one pool of weights and one pool of KV.

::

    from crosspool import LLM, SamplingParams

    with LLM(models={"a": "path/to/a", "b": "path/to/b"}) as llm:
        for output in llm.generate(["The sky is"], SamplingParams(max_tokens=32), model="a"):
            print(output.text)

Names are imported when first used, so that ``crosspool.core`` stays free of everything above it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
    from crosspool.core.errors import (
        ConfigError,
        CorruptCheckpointError,
        CrossPoolError,
        DeviceError,
        EngineDeadError,
        InvalidRequestError,
        InvariantError,
        MissingTensorError,
        ModelLoadError,
        ModelNotFoundError,
        ModelUnavailableError,
        OutOfMemoryError,
        OverloadedError,
        RequestError,
        RequestTooLargeError,
        TensorShapeError,
        UnsupportedModelError,
    )
    from crosspool.core.request import FinishReason
    from crosspool.core.sampling import SamplingParams
    from crosspool.llm import (
        LLM,
        AsyncLLM,
        CompletionOutput,
        OutputLogprobs,
        RequestOutput,
        TextDelta,
        TokenChance,
    )

__version__ = "0.1.0"

# Where the public names live, the cheapest to import first.
_HOMES = (
    "crosspool.core.errors",
    "crosspool.core.config",
    "crosspool.core.request",
    "crosspool.core.sampling",
    "crosspool.llm",
)

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "CorruptCheckpointError",
    "CrossPoolError",
    "DeviceError",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "InvalidRequestError",
    "InvariantError",
    "MissingTensorError",
    "ModelConfig",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelUnavailableError",
    "OutOfMemoryError",
    "OutputLogprobs",
    "OverloadedError",
    "PoolConfig",
    "RequestError",
    "RequestOutput",
    "RequestTooLargeError",
    "SamplingParams",
    "SchedulerConfig",
    "TensorShapeError",
    "TextDelta",
    "TokenChance",
    "UnsupportedModelError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(home)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
