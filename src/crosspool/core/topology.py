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
    computes a partial sum and the attention side adds them in device order. MODEL: whole models, each on the
    device that is home to its KV: there are no two pools then, and both lists name the same devices.
    """

    LAYER = "layer"
    TENSOR = "tensor"
    MODEL = "model"


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
        if self.sharding is Sharding.MODEL and self.kv_devices != self.weights_devices:
            raise ConfigError(
                "where each model is wholly on one device, KV devices and weights devices are the same, not "
                f"{', '.join(self.kv_devices)} and {', '.join(self.weights_devices)}"
            )

    @property
    def teams(self) -> tuple[str, ...]:
        """Every device once, KV devices first."""
        return tuple(dict.fromkeys(self.kv_devices + self.weights_devices))

    @property
    def one_device(self) -> bool:
        return len(self.teams) == 1

    def attention_team(self, device: KvDevice) -> Team:
        return Team(self.teams.index(self.kv_devices[device]))

    def attention_devices(self, home: KvDevice) -> tuple[KvDevice, ...]:
        """The KV devices on which a model with this home may have KV, and so attention: all of them unless
        models are bound to theirs."""
        if self.sharding is Sharding.MODEL:
            return (home,)
        return tuple(KvDevice(device) for device in range(len(self.kv_devices)))

    def weights_team(self, device: WeightsDevice) -> Team:
        return Team(self.teams.index(self.weights_devices[device]))

    def ffn_devices(self, layer: int, home: KvDevice) -> tuple[WeightsDevice, ...]:
        """The weights devices that take part in the FFN of this layer of a model, or of a micro-batch, whose
        home is ``home``, in the order in which results are added."""
        if self.sharding is Sharding.TENSOR:
            return tuple(WeightsDevice(i) for i in range(len(self.weights_devices)))
        if self.sharding is Sharding.MODEL:
            return (WeightsDevice(home),)
        return (WeightsDevice(layer % len(self.weights_devices)),)

    @property
    def ffn_parts(self) -> int:
        """How many devices share each FFN."""
        return len(self.weights_devices) if self.sharding is Sharding.TENSOR else 1
