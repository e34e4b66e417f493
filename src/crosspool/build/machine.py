"""What an engine runs on: devices of one kind, how the pools are sized for them, and who works there."""

from __future__ import annotations

from typing import Protocol

from crosspool.backends.factory import are_cuda
from crosspool.build.pool_plan import PoolPlan
from crosspool.build.workers import Specs, Workers
from crosspool.core.config import EngineConfig
from crosspool.core.spec import ModelSpec
from crosspool.costs.layer import HardwareProfile


class Machine(Protocol):
    @property
    def profile(self) -> HardwareProfile:
        """What costs are first guessed by."""
        ...

    def held(self, spec: ModelSpec) -> ModelSpec:
        """A model as it is held here: what the devices cannot compute with is converted while it loads."""
        ...

    def plan(self, specs: Specs) -> PoolPlan:
        """Raises OutOfMemoryError or ConfigError if the pools do not fit."""
        ...

    def workers(self, plan: PoolPlan, specs: Specs) -> Workers:
        """Allocates the KV pool. Raises OutOfMemoryError."""
        ...


def make_machine(config: EngineConfig) -> Machine:
    """Raises ConfigError for devices that are not there, or cannot do what the configuration asks. What a
    kind of machine needs is imported only for it."""
    if are_cuda(config.topology.teams):
        from crosspool.build.cuda import CudaMachine

        return CudaMachine(config)
    from crosspool.build.cpu import CpuMachine

    return CpuMachine(config)
