"""From loaded weights to an executor: what each kind of kernels needs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from crosspool.backends.base import Backend
from crosspool.core.config import EngineConfig, Kernels
from crosspool.core.ids import ModelIndex, WeightsDevice
from crosspool.core.kv_layout import KvLayout
from crosspool.core.protocols import Executor
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Topology
from crosspool.models.moe_decoder import AttentionSide
from crosspool.models.weights import AttentionSideWeights, FfnWeights
from crosspool.workers.attention import AttentionWorker
from crosspool.workers.clock import MonotonicClock
from crosspool.workers.executor import ThreadedExecutor
from crosspool.workers.ffn import FfnWorker, WeightRow, WeightTable
from crosspool.workers.resident.executor import ResidentExecutor
from crosspool.workers.resident.model import ResidentModel

Compiling = Callable[[int, int], None]
"""Told how many of how many pieces of code are there."""


class Workers(Protocol):
    """Takes models piece by piece, and then makes the executor that runs them."""

    def put_attention_side(
        self, model: ModelIndex, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights
    ) -> None: ...

    def put_ffn(
        self, model: ModelIndex, layer: int, part: int, device: WeightsDevice, weights: FfnWeights
    ) -> None:
        """Part ``part`` of a layer's FFN, on this weights device. The attention side is there already."""
        ...

    def remove(self, model: ModelIndex) -> None:
        """Forget whatever was put of a model."""
        ...

    def start(self, backends: Sequence[Backend], arenas: Sequence[Tensor], compiling: Compiling) -> Executor:
        """``backends`` in the order of the topology's teams, ``arenas`` in that of its KV devices."""
        ...


def make_workers(config: EngineConfig) -> Workers:
    if config.kernels is Kernels.REFERENCE:
        return ReferenceWorkers(config.topology)
    return CompiledWorkers(config)


class CompiledWorkers:
    """For compiled kernels: descriptors of every model, and resident teams."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._parts = len(config.topology.ffn_devices(0))
        self._models: dict[ModelIndex, ResidentModel] = {}

    def put_attention_side(
        self, model: ModelIndex, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights
    ) -> None:
        self._models[model] = ResidentModel(spec, layout, weights, parts=self._parts)

    def put_ffn(
        self, model: ModelIndex, layer: int, part: int, device: WeightsDevice, weights: FfnWeights
    ) -> None:
        self._models[model].put_ffn(layer, part, weights)

    def remove(self, model: ModelIndex) -> None:
        self._models.pop(model, None)

    def start(self, backends: Sequence[Backend], arenas: Sequence[Tensor], compiling: Compiling) -> Executor:
        limits = self._config.scheduler
        return ResidentExecutor(
            self._config.topology,
            backends,
            arenas,
            self._models,
            most_tokens=max(limits.max_chunk_tokens, limits.max_batch_rows),
            most_rows=max(limits.max_batch_rows, limits.max_prefill_rows),
            compiling=compiling,
        )


class ReferenceWorkers:
    """For the reference kernels: plain torch, one thread a team, and Python between all layer tasks."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._specs: dict[ModelIndex, ModelSpec] = {}
        self._sides: list[dict[ModelIndex, AttentionSide]] = [{} for _ in topology.kv_devices]
        self._tables = [WeightTable() for _ in topology.weights_devices]

    def put_attention_side(
        self, model: ModelIndex, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights
    ) -> None:
        """One side per KV device over the same weights, for each keeps tables of its own."""
        self._specs[model] = spec
        for sides in self._sides:
            sides[model] = AttentionSide(spec, layout, weights)

    def put_ffn(
        self, model: ModelIndex, layer: int, part: int, device: WeightsDevice, weights: FfnWeights
    ) -> None:
        row = WeightRow(self._specs[model].layers[layer].ffn, weights)
        self._tables[device].put(model, layer, row)

    def remove(self, model: ModelIndex) -> None:
        self._specs.pop(model, None)
        for sides in self._sides:
            sides.pop(model, None)
        for table in self._tables:
            table.remove(model)

    def start(self, backends: Sequence[Backend], arenas: Sequence[Tensor], compiling: Compiling) -> Executor:
        layers: Mapping[ModelIndex, int] = {model: spec.num_layers for model, spec in self._specs.items()}
        return ThreadedExecutor(
            self._topology,
            backends,
            [AttentionWorker(sides, arena) for sides, arena in zip(self._sides, arenas, strict=True)],
            [FfnWorker(table) for table in self._tables],
            layers,
            MonotonicClock(),
        )
