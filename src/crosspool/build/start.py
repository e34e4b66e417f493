"""The door to the real engine for processes that may not need one: importing this imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import MappingProxyType

from crosspool.core.config import EngineConfig
from crosspool.core.info import LoadProgress
from crosspool.engine.engine import Engine


def start_engine(config: EngineConfig, progress: Callable[[LoadProgress], None] | None = None) -> Engine:
    """See build.runtime.build_engine, which this calls."""
    _prepare_torch()
    from crosspool.build.runtime import build_engine

    return build_engine(config, progress)


TORCH_SETTINGS = MappingProxyType(
    {
        "OMP_WAIT_POLICY": "PASSIVE",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    }
)
"""What torch's libraries are told before they are loaded; there is no other way to tell them.

OpenMP's threads are to sleep where they wait for each other. Spinning threads on cores that others use too
(the API process, any other program) take turns with those they wait for: decoding then falls from tens of
tokens a second to less than one. oneDNN compiles and keeps a kernel for each shape, and a serving engine sees
a new number of rows all the time: 128 of them are as fast as the 1,024 it would keep, in 400 MB less.
"""


def _prepare_torch() -> None:
    """Whoever imported torch before, or set these in the environment, has made the choice."""
    if "torch" not in sys.modules:
        for name, value in TORCH_SETTINGS.items():
            os.environ.setdefault(name, value)
