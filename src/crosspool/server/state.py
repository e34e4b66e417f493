"""What the routes share: one object, made by run.py and given to each router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from crosspool.core.errors import EngineDeadError
from crosspool.core.info import LoadProgress
from crosspool.llm import AsyncLLM
from crosspool.metrics.prometheus import Exposition
from crosspool.server.config import ServerConfig
from crosspool.server.limits import Admission
from crosspool.server.supervisor import EngineState


@dataclass(slots=True)
class ServerState:
    """``open_llm`` is None until the engine was ready once; ``loading`` has each model's last progress."""

    config: ServerConfig
    engine_state: Callable[[], EngineState]
    metrics: Exposition
    admission: Admission
    open_llm: AsyncLLM | None = None
    loading: dict[str, LoadProgress] = field(default_factory=dict)

    @property
    def llm(self) -> AsyncLLM:
        """Raises EngineDeadError while the engine is not ready."""
        if self.open_llm is None:
            raise EngineDeadError("the engine is still loading its models")
        if self.engine_state() is not EngineState.READY:
            raise EngineDeadError("the engine is being restarted")
        return self.open_llm

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        if self.open_llm is None or self.engine_state() is not EngineState.READY or self.admission.closed:
            return False
        return any(model.error is None for model in self.open_llm.models)
