"""Section 4: the Mixture-of-Experts FFN of a Qwen3-30B-A3B layer at few rows, with weights from memory.

A round goes through layers whose weights together are many times the L2 cache. What counts is the bytes of
the experts that were chosen, each read once. In float8 the same weights have half the bytes: no target is set
for their bandwidth, for at few rows launches take their part of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from crosspool.core.spec import ModelSpec
from crosspool.workers.cuda.ffn_side import FfnSidePass
from gpu.device import Gpu
from gpu.ffn_resident import RESIDENT_ROWS, resident_figures
from gpu.models import LoadedModel, in_room, spec_of, write_config
from gpu.results import Case, Figure, NotMeasured

TARGETS = {1: 0.65, 8: 0.80, 32: 0.85}
"""Share of a copy's bandwidth, by rows."""

GEOMETRY: dict[str, Any] = {"num_hidden_layers": 8, "vocab_size": 1024}
TINY: dict[str, Any] = GEOMETRY | {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@dataclass
class Layers:
    """All layers' FFNs for so many rows, from the same hidden states."""

    gpu: Gpu
    loaded: LoadedModel
    rows: int

    def __post_init__(self) -> None:
        spec, lane = self.loaded.spec, self.loaded.lane(self.rows)
        chip, geometry = self.gpu.device.chip, self.loaded.model.geometry
        self.side = in_room(self.gpu, lambda room: FfnSidePass(geometry, self.rows, 0, 1, chip, lane, room))
        self.x = self.gpu.random(self.rows, spec.hidden_size)
        self.out = torch.empty_like(self.x)

    def launch(self) -> None:
        for layer in range(self.loaded.spec.num_layers):
            self.side.ffn(layer, self.x, self.out)

    def bytes_read(self) -> int:
        """Of routers and of chosen experts, in all layers."""
        spec, total = self.loaded.spec, 0
        for layer in range(spec.num_layers):
            self.gpu.eager(partial(self.side.ffn, layer, self.x, self.out))()
            self.gpu.device.finish()
            (room,) = self.side._rooms
            chosen = int(room.chosen.unique().numel())
            total += _bytes(spec, layer, chosen)
        return total


def _bytes(spec: ModelSpec, layer: int, experts: int) -> int:
    own = spec.layers[layer].ffn
    expert = spec.bytes_of_ffn(replace(own, router=None))
    return own.router_weights(spec.hidden_size) * spec.dtype.bytes + experts * expert


def cases(gpu: Gpu) -> list[Case]:
    @cache
    def loaded(float8: bool) -> LoadedModel:
        changes = TINY if gpu.interpreted else GEOMETRY
        spec = spec_of(write_config(gpu.folder / "ffn", "qwen3-30b-a3b", **changes))
        return LoadedModel(gpu, spec.with_float8(range(spec.num_layers)) if float8 else spec)

    def rows(count: int, float8: bool) -> list[Figure]:
        layers = Layers(gpu, loaded(float8), count)
        number, read = layers.loaded.spec.num_layers, layers.bytes_read()
        eager = gpu.seconds(gpu.eager(layers.launch)) / number
        graph = gpu.seconds(gpu.recorded(layers.launch)) / number
        assert bool(layers.out.isfinite().all()), "not all outputs are numbers"
        return [
            *gpu.bandwidth_figures("eager, a layer", read / number, eager, None),
            *gpu.bandwidth_figures(
                "graph, a layer", read / number, graph, None if float8 else TARGETS[count]
            ),
        ]

    def resident(count: int) -> list[Figure]:
        if gpu.interpreted:
            raise NotMeasured("interpreted programs run one after another: they would not meet")
        return resident_figures(gpu, Layers(gpu, loaded(False), count))

    return [
        *(Case(f"{count} rows", partial(rows, count, False), 90) for count in TARGETS),
        *(Case(f"{count} rows, resident", partial(resident, count), 90) for count in RESIDENT_ROWS),
        *(Case(f"{count} rows, float8", partial(rows, count, True), 90) for count in TARGETS),
    ]
