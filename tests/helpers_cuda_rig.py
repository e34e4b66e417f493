"""Tiny models under the executor for devices with streams: interpreted ones, or, where kernels are compiled,
the machine's GPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from crosspool.backends.device import Device
from crosspool.core.ids import KvDevice, ModelIndex
from crosspool.core.topology import Topology
from crosspool.workers.clock import MonotonicClock
from crosspool.workers.cuda.attention import KvPages
from crosspool.workers.cuda.copies import HostPages, PageCopier
from crosspool.workers.cuda.executor import CudaExecutor
from crosspool.workers.cuda.feeder import Feeder, route_of, routes_of
from crosspool.workers.cuda.home import GrantLimits, Home, HomePlan
from crosspool.workers.cuda.model import DeviceModel, FfnPlace
from crosspool.workers.cuda.weights import WeightsArena
from helpers_devices import InterpretedDevice
from helpers_triton import INTERPRETED
from helpers_workers import PAGE_BYTES, Rig, TinyModel

LIMITS = GrantLimits(decode_rows=4, prefill_rows=4, prefill_tokens=64, steps=64, sequences=16)
ARENA_BYTES = 1 << 22
HOST_PAGES = 40


def make_device(name: str) -> Device:
    """A GPU that the machine does not have is one more device on the first."""
    if INTERPRETED:
        return InterpretedDevice(name)
    from crosspool.backends.cuda import make_cuda_devices

    number = int(name.removeprefix("cuda:").partition("/")[0])
    there = number < torch.cuda.device_count()
    return make_cuda_devices([name if there else f"cuda:0/{number}"])[0]


def device_models(
    models: list[TinyModel], topology: Topology, devices: list[Device]
) -> dict[ModelIndex, DeviceModel]:
    arenas: Mapping[int, WeightsArena] = {
        team: WeightsArena(device, ARENA_BYTES) for team, device in enumerate(devices)
    }
    made, home = {}, KvDevice(0)
    teams_of_kv = [topology.attention_team(device) for device in topology.attention_devices(home)]
    for index, model in enumerate(models):
        own = DeviceModel(model.spec, model.layout, model.weights, arenas, teams_of_kv)
        for layer, weights in enumerate(model.ffns):
            teams = route_of(topology, home, model.spec.num_layers).ffns[layer]
            for part, team in enumerate(teams):
                own.put_ffn(layer, FfnPlace(team, part, len(teams)), weights)
        own.finish(topology.ffn_parts)
        made[ModelIndex(index)] = own
    return made


class CudaRig(Rig):
    """All models are at home on the first KV device, or where they have no homes on all of them."""

    def _make(self, topology: Topology, resident: bool, threads: int, tasks: int | None) -> CudaExecutor:
        self.devices = [make_device(name) for name in topology.teams]
        if not INTERPRETED:
            self.arena = self.arena.to(self.devices[0].physical)
        models = device_models(list(self.models), topology, self.devices)
        kv: dict[int, KvPages] = {}
        for device in self.places.devices:
            team, pages = topology.attention_team(device), self.places.pages_of(device)
            arena = self.arena[pages.start : pages.stop]
            if not INTERPRETED:
                arena = arena.to(self.devices[team].physical)
            kv[team] = KvPages(arena, pages.start)
        homes = []
        for device in self.places.devices:
            own = {
                (model.geometry, route): model
                for model in models.values()
                if device in topology.attention_devices(KvDevice(0))
                for route in routes_of(topology, device, model.geometry.num_layers)
            }
            team = topology.attention_team(device)
            plan = HomePlan(team, self.devices, own.keys(), LIMITS, topology.ffn_parts)
            homes.append(Home(plan, kv, own))
        feeder = Feeder(topology, homes, models, LIMITS, MonotonicClock())
        kv = [self.devices[topology.attention_team(device)] for device in self.places.devices]
        arenas = [
            self.arena[pages.start : pages.stop] for pages in map(self.places.pages_of, self.places.devices)
        ]
        host = HostPages(kv[0], HOST_PAGES, PAGE_BYTES)
        copier = PageCopier(self.places, kv, arenas, host)
        return CudaExecutor(feeder, copier, self.devices, pause=1e-3)


@contextmanager
def cuda_rig(*models: TinyModel, **how: object) -> Iterator[CudaRig]:
    """A rig that is closed at the end and must leave no thread behind."""
    before = set(threading.enumerate())
    made = CudaRig(models, **how)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.executor.close()
    assert set(threading.enumerate()) <= before, "the executor left threads behind"
