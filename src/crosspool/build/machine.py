"""What an engine runs on: devices of one kind, how the pools are sized for them, and who works there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from crosspool.backends.factory import are_cuda, make_backends
from crosspool.build.pool_plan import PoolPlan, plan_pools
from crosspool.build.workers import CompiledWorkers, ReferenceWorkers, Workers
from crosspool.core.config import EngineConfig, Kernels
from crosspool.core.ids import KvDevice, ModelIndex
from crosspool.core.spec import ModelSpec
from crosspool.costs.layer import HardwareProfile

Specs = Mapping[ModelIndex, ModelSpec]


class Machine(Protocol):
    @property
    def profile(self) -> HardwareProfile:
        """What costs are first guessed by."""
        ...

    def plan(self, specs: Specs) -> PoolPlan:
        """Raises OutOfMemoryError or ConfigError if the pools do not fit."""
        ...

    def workers(self, plan: PoolPlan, specs: Specs) -> Workers:
        """Allocates the KV pool. Raises OutOfMemoryError."""
        ...


def make_machine(config: EngineConfig) -> Machine:
    """Raises ConfigError for devices that are not there, or cannot do what the configuration asks."""
    if are_cuda(config.topology.teams):
        from crosspool.build.cuda import CudaMachine

        return CudaMachine(config)
    return CpuMachine(config)


class CpuMachine:
    """Shares of the cores, and the host's memory together."""

    profile = HardwareProfile()

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        reference = config.kernels is Kernels.REFERENCE
        self._backends = make_backends(config.topology.teams, config.threads, leave_a_core=reference)

    def plan(self, specs: Specs) -> PoolPlan:
        return plan_pools(self._config, specs, self._backends[0].free_bytes)

    def workers(self, plan: PoolPlan, specs: Specs) -> Workers:
        """One arena has the pages of all KV devices, which share an address space."""
        config, backends = self._config, self._backends
        home = backends[config.topology.attention_team(KvDevice(0))]
        arena = home.new_arena(plan.places.total, plan.page_bytes)
        if config.kernels is Kernels.REFERENCE:
            return ReferenceWorkers(config.topology, backends, plan, arena)
        return CompiledWorkers(config, backends, plan, arena)
