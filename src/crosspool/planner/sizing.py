"""What the bytes that a plan asks for mean in devices, pooled and in the two usual ways without pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
from numpy.typing import NDArray

from crosspool.core.errors import ConfigError
from crosspool.core.kv_layout import KvLayout
from crosspool.core.spec import ModelSpec
from crosspool.planner.demand import most_tokens

KvBytes = Callable[[NDArray[np.bool_]], float]
"""Bytes of KV that some of the models need together."""


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A model of a zoo: what it is called and what it is."""

    name: str
    spec: ModelSpec

    @property
    def weights_bytes(self) -> int:
        return self.spec.total_ffn_bytes + self.spec.attention_side_bytes


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to place a zoo. ``largest_context``: by model, tokens of the longest request that its KV
    holds."""

    kv_bytes: int
    weights_bytes: int
    devices: int
    largest_context: dict[str, int]


@dataclass(frozen=True, slots=True)
class Pools:
    """Devices of each pool. Every KV device holds the attention sides of all models; FFN weights are spread
    over the weights devices by layers."""

    kv_devices: int
    weights_devices: int


def pool_devices(models: Sequence[ZooModel], kv_bytes: int, memory: int) -> Pools:
    """Devices of ``memory`` bytes for both pools. Raises ConfigError if attention sides leave no room."""
    attention = sum(model.spec.attention_side_bytes for model in models)
    ffn = sum(model.spec.total_ffn_bytes for model in models)
    if attention >= memory:
        raise ConfigError(
            f"the attention sides of {len(models)} models take {attention:,} bytes on each KV device, which "
            f"has {memory:,}: give more with --device-memory"
        )
    return Pools(ceil(kv_bytes / (memory - attention)), ceil(ffn / memory))


def pooled(models: Sequence[ZooModel], layouts: Sequence[KvLayout], kv_bytes: int, pools: Pools) -> Mode:
    """Two pools: every request may use all of the KV pool."""
    weights = sum(model.spec.total_ffn_bytes for model in models)
    weights += pools.kv_devices * sum(model.spec.attention_side_bytes for model in models)
    contexts = {
        model.name: most_tokens(layout, kv_bytes) for model, layout in zip(models, layouts, strict=True)
    }
    return Mode(kv_bytes, weights, pools.kv_devices + pools.weights_devices, contexts)


def static(models: Sequence[ZooModel], layouts: Sequence[KvLayout], memory: int, need: KvBytes) -> Mode:
    """Every model has KV of its own, beside its weights. Models share a device where both fit wholly."""
    kv = [need(np.arange(len(models)) == index) for index in range(len(models))]
    boxes = _Boxes(memory)
    order = sorted(range(len(models)), key=lambda index: -models[index].weights_bytes - kv[index])
    for index in order:
        boxes.put(index, lambda held: sum(models[i].weights_bytes + kv[i] for i in held))
    contexts = {model.name: most_tokens(layouts[i], kv[i]) for i, model in enumerate(models)}
    weights = sum(model.weights_bytes for model in models)
    return Mode(ceil(sum(kv)), weights, boxes.devices, contexts)


def monolithic(models: Sequence[ZooModel], layouts: Sequence[KvLayout], memory: int, need: KvBytes) -> Mode:
    """Weights and KV of a model on the same device, whose models share what their weights leave."""

    def kv(held: Sequence[int]) -> float:
        return need(np.isin(np.arange(len(models)), held))

    boxes = _Boxes(memory)
    for index in sorted(range(len(models)), key=lambda index: -models[index].weights_bytes):
        boxes.put(index, lambda held: sum(models[i].weights_bytes for i in held) + kv(held))
    contexts: dict[str, int] = {}
    total = 0.0
    for held in boxes.held:
        room = kv(held)
        total += room
        contexts |= {models[i].name: most_tokens(layouts[i], room) for i in held}
    weights = sum(model.weights_bytes for model in models)
    return Mode(ceil(total), weights, boxes.devices, {m.name: contexts[m.name] for m in models})


@dataclass(slots=True)
class _Boxes:
    """Models put on devices, first fit. One that is too large for a device has several for itself."""

    memory: int
    held: list[list[int]] = field(default_factory=list)
    devices: int = 0

    def put(self, index: int, needed: Callable[[Sequence[int]], float]) -> None:
        alone = needed([index])
        if alone <= self.memory:
            # What fits is tried last: it asks how much the models need together.
            for held in self.held:
                if needed([*held, index]) <= self.memory:
                    held.append(index)
                    return
        self.held.append([index])
        self.devices += ceil(alone / self.memory)
