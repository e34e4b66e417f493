"""The door to the real engine for processes that may not need one: importing this imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from crosspool.core.config import EngineConfig
from crosspool.core.info import LoadProgress
from crosspool.engine.engine import Engine


def start_engine(config: EngineConfig, progress: Callable[[LoadProgress], None] | None = None) -> Engine:
    """See build.runtime.build_engine, which this calls."""
    _let_openmp_sleep()
    from crosspool.build.runtime import build_engine

    return build_engine(config, progress)


def _let_openmp_sleep() -> None:
    """Ask torch's OpenMP threads to sleep, not to spin, where they wait for each other.

    Spinning threads on cores that others use too (the API process, any other program) take turns with those
    they wait for: decoding then falls from tens of tokens a second to less than one. OpenMP reads this once,
    when torch is first imported; whoever imported it before has made the choice.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
