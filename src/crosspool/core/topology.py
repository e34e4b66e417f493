"""Which team of workers runs which half of which layer.

A team is the workers of one device. Both pools on one device share one team (one-device mode); pools on
different devices have a team each and the layer pipeline runs between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from crosspool.core.errors import ConfigError
from crosspool.core.ids import KvDevice, WeightsDevice

Team = NewType("Team", int)
"""Index into ``Topology.teams``."""


class Sharding(StrEnum):
    """How FFN weights are spread over several weights devices.

    LAYER: whole layers in turn. TENSOR: every FFN is cut along its intermediate dimension; each device
    computes a partial sum and the attention side adds them in device order.
    """

    LAYER = "layer"
    TENSOR = "tensor"


@dataclass(frozen=True, slots=True)
class Topology:
    """Devices of the two pools, by name (``cpu:0``), and the teams that follow from them."""

    kv_devices: tuple[str, ...]
    weights_devices: tuple[str, ...]
    sharding: Sharding = Sharding.LAYER

    def __post_init__(self) -> None:
        for name, devices in (("kv_devices", self.kv_devices), ("weights_devices", self.weights_devices)):
            if not devices:
                raise ConfigError(f"{name} is empty: at least one device is needed")
            if len(set(devices)) != len(devices):
                raise ConfigError(f"{name} names a device twice: {', '.join(devices)}")

    @property
    def teams(self) -> tuple[str, ...]:
        """Every device once, KV devices first."""
        return tuple(dict.fromkeys(self.kv_devices + self.weights_devices))

    @property
    def one_device(self) -> bool:
        return len(self.teams) == 1

    def attention_team(self, device: KvDevice) -> Team:
        return Team(self.teams.index(self.kv_devices[device]))

    def weights_team(self, device: WeightsDevice) -> Team:
        return Team(self.teams.index(self.weights_devices[device]))

    def ffn_devices(self, layer: int) -> tuple[WeightsDevice, ...]:
        """The weights devices that take part in this layer's FFN, in the order in which results are added."""
        if self.sharding is Sharding.TENSOR:
            return tuple(WeightsDevice(i) for i in range(len(self.weights_devices)))
        return (WeightsDevice(layer % len(self.weights_devices)),)
