"""An engine on CPU devices: the machine, and from loaded weights to the executor of each kind of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from crosspool.backends.base import Backend, WeightsArena
from crosspool.backends.factory import make_backends
from crosspool.build.pool_plan import PoolPlan, plan_pools
from crosspool.build.workers import Compiling, Specs, Workers
from crosspool.core.config import EngineConfig, Kernels, WeightsMemory
from crosspool.core.errors import ConfigError
from crosspool.core.ids import KvDevice, ModelIndex
from crosspool.core.kv_layout import KvLayout
from crosspool.core.protocols import Executor
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Team, Topology
from crosspool.costs.layer import HardwareProfile
from crosspool.models.moe_decoder import AttentionSide
from crosspool.models.placement import InArena, InPlace, Placement, read_in
from crosspool.models.weights import AttentionSideWeights, FfnWeights, shard_ffn
from crosspool.workers.attention import AttentionWorker
from crosspool.workers.clock import MonotonicClock
from crosspool.workers.copier import HostCopier
from crosspool.workers.executor import ThreadedExecutor
from crosspool.workers.ffn import FfnWorker, WeightRow, WeightTable
from crosspool.workers.resident.executor import ResidentExecutor
from crosspool.workers.resident.model import ResidentModel


class CpuMachine:
    """Shares of the cores, and the host's memory together."""

    profile = HardwareProfile()

    def __init__(self, config: EngineConfig) -> None:
        for model in config.models:
            if model.weights_dtype == "float8":
                raise ConfigError(f"model {model.name}: weights_dtype float8 needs GPUs")
        self._config = config
        reference = config.kernels is Kernels.REFERENCE
        self._backends = make_backends(config.topology.teams, config.threads, leave_a_core=reference)

    def held(self, spec: ModelSpec) -> ModelSpec:
        """Float8 is dequantised while it loads, to model dtype and then perhaps to int8. So it is copied
        even where weights are read from mapped files, and takes the bytes of what it has become."""
        return spec.with_float8(())

    def plan(self, specs: Specs) -> PoolPlan:
        return plan_pools(self._config, specs, self._backends[0].free_bytes)

    def workers(self, plan: PoolPlan, specs: Specs) -> Workers:
        """One arena has the pages of all KV devices, which share an address space with the spill store."""
        config, backends = self._config, self._backends
        home = backends[config.topology.attention_team(KvDevice(0))]
        arena, copier = home.new_arena(plan.places.total, plan.page_bytes), None
        if plan.spill_pages:
            copier = HostCopier(arena, home.new_host_arena(plan.spill_pages, plan.page_bytes))
        if config.kernels is Kernels.REFERENCE:
            return ReferenceWorkers(config.topology, backends, plan, arena, copier)
        return CompiledWorkers(config, backends, plan, arena, copier)


class CompiledWorkers:
    """For compiled kernels: descriptors of every model, and resident teams. ``arena`` has the pages of all KV
    devices, as the plan says; without a ``copier`` there is no spill store."""

    def __init__(
        self,
        config: EngineConfig,
        backends: Sequence[Backend],
        plan: PoolPlan,
        arena: Tensor,
        copier: HostCopier | None,
    ) -> None:
        self._config = config
        self._arena = arena
        self._copier = copier
        self._plan = plan
        self._backends = backends
        self._models: dict[ModelIndex, ResidentModel] = {}
        self._arenas: dict[tuple[ModelIndex, Team], WeightsArena] = {}

    def put_attention_side(
        self, model: ModelIndex, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights
    ) -> None:
        """There is one copy, on the model's home."""
        topology = self._config.topology
        with self._place(model, spec, topology.attention_team(self._plan.home(model))) as place:
            self._models[model] = ResidentModel(spec, layout, weights, parts=topology.ffn_parts, place=place)

    def put_ffn(self, model: ModelIndex, layer: int, weights: FfnWeights) -> None:
        topology, resident = self._config.topology, self._models[model]
        for part, device in enumerate(topology.ffn_devices(layer, self._plan.home(model))):
            with self._place(model, resident.spec, topology.weights_team(device)) as place:
                resident.put_ffn(layer, part, weights, place)

    def copies(self, spec: ModelSpec) -> bool:
        return spec.int8_weights or self._config.pools.weights_memory is WeightsMemory.HUGE

    @contextmanager
    def _place(self, model: ModelIndex, spec: ModelSpec, team: Team) -> Iterator[Placement]:
        """What is put within is in place afterwards. Each model has an arena on each device."""
        if not self.copies(spec):
            yield InPlace()
            return
        backend = self._backends[team]
        arena = self._arenas.setdefault((model, team), backend.new_weights_arena())
        with _threads_of(backend) as threads:
            place = InArena(arena, threads, int8=spec.int8_weights)
            yield place
            place.finish()

    def remove(self, model: ModelIndex) -> None:
        self._models.pop(model, None)
        self._arenas = {key: arena for key, arena in self._arenas.items() if key[0] != model}

    def start(self, compiling: Compiling) -> Executor:
        limits = self._config.scheduler
        return ResidentExecutor(
            self._config.topology,
            self._backends,
            self._arena,
            self._plan.places,
            self._models,
            most_tokens=max(limits.max_chunk_tokens, limits.max_batch_rows),
            most_rows=max(limits.max_batch_rows, limits.max_prefill_rows),
            compiling=compiling,
            copier=self._copier,
        )


@contextmanager
def _threads_of(backend: Backend) -> Iterator[ThreadPoolExecutor]:
    """A pool on a device's cores, each thread of which computes by itself.

    OpenMP's teams would wait for each other's parts in a loop, which is slow on cores that others use too.
    """

    def bind() -> None:
        backend.bind_thread()
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(backend.threads, initializer=bind) as threads:
        yield threads
    torch.set_num_threads(before)  # It is also what later threads begin with.


class ReferenceWorkers:
    """For the reference kernels: plain torch, one thread a team, and Python between all layer tasks."""

    def __init__(
        self,
        topology: Topology,
        backends: Sequence[Backend],
        plan: PoolPlan,
        arena: Tensor,
        copier: HostCopier | None,
    ) -> None:
        self._topology = topology
        self._arena = arena
        self._copier = copier
        self._plan = plan
        self._backends = backends
        self._specs: dict[ModelIndex, ModelSpec] = {}
        self._sides: list[dict[ModelIndex, AttentionSide]] = [{} for _ in topology.kv_devices]
        self._tables = [WeightTable() for _ in topology.weights_devices]

    def put_attention_side(
        self, model: ModelIndex, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights
    ) -> None:
        """One side per KV device over the same weights, for each keeps tables of its own."""
        read_in(weights.tensors())
        self._specs[model] = spec
        for sides in self._sides:
            sides[model] = AttentionSide(spec, layout, weights)

    def put_ffn(self, model: ModelIndex, layer: int, weights: FfnWeights) -> None:
        read_in(weights.tensors())
        spec = self._specs[model].layers[layer].ffn
        devices = self._topology.ffn_devices(layer, self._plan.home(model))
        for part, device in enumerate(devices):
            row = WeightRow(spec, shard_ffn(weights, part, len(devices)))
            self._tables[device].put(model, layer, row)

    def copies(self, spec: ModelSpec) -> bool:
        return False

    def remove(self, model: ModelIndex) -> None:
        self._specs.pop(model, None)
        for sides in self._sides:
            sides.pop(model, None)
        for table in self._tables:
            table.remove(model)

    def start(self, compiling: Compiling) -> Executor:
        layers: Mapping[ModelIndex, int] = {model: spec.num_layers for model, spec in self._specs.items()}
        return ThreadedExecutor(
            self._topology,
            self._backends,
            [AttentionWorker(sides, self._arena) for sides in self._sides],
            [FfnWorker(table) for table in self._tables],
            layers,
            MonotonicClock(),
            self._copier,
        )
