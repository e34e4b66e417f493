"""The resident FFN kernel beside the launches of ffn.py: a recorded graph of kernels that each ask for one
layer and wait for it, as a pass would, and the host that launches the resident kernel when it is asked to."""

from __future__ import annotations

import time
from typing import Any

import torch

from crosspool.kernels.triton.ffn_queue import NEWS_WORDS, FfnQueue, ask, launches_asked_for, queue_words
from crosspool.kernels.triton.resident_ffn import resident_room, serve
from gpu.device import Gpu
from gpu.results import Figure

RESIDENT_ROWS = (1, 8)
SLOTS = 8
PATIENCE, MOST_LOOKS = 20_000, 2_000_000
"""Looks without work after which the kernel ends, some ten milliseconds: it stays from one round to the next.
And looks after which a wait has failed."""

MOST_SECONDS = 20.0


class Resident:
    """A queue of the layers' plan, its scratch, and the stream of the kernel that serves it."""

    def __init__(self, gpu: Gpu, layers: Any) -> None:
        device, side = gpu.device, layers.side
        (self.plan,) = side._plans
        self.gpu, self.layers = gpu, layers
        words, news = (
            device.tensor((queue_words(SLOTS),), torch.int64),
            device.pinned((NEWS_WORDS,), torch.int64),
        )
        self.queue = FfnQueue(words, news, SLOTS, device.processors, PATIENCE, MOST_LOOKS)
        self.room = resident_room(self.plan, device.processors, gpu.at)
        self.lane, self.out = side._lane, torch.full_like(layers.out, 7.0)
        self.stream = device.stream(urgent=True)
        self.launched = 0
        device.finish()
        self.launch()  # Compiled before anybody waits for it. It ends idle.
        device.finish()

    def launch(self) -> None:
        self.launched += 1
        self.gpu.device.run(self.stream, lambda: serve(self.plan, self.queue, self.room, self.launched))

    def ask(self) -> None:
        for layer in range(self.layers.loaded.spec.num_layers):
            ask(self.queue, self.lane, layer, self.layers.x, self.out)

    def follow(self) -> None:
        """Launch when asked to, until the stream that asks is done. Raises RuntimeError if the queue has
        failed, TimeoutError if it takes too long."""
        done, end = self.gpu.device.record(self.gpu.stream), time.monotonic() + MOST_SECONDS
        while not done.done():
            for _ in range(launches_asked_for(self.queue, self.launched)):
                self.launch()
            if time.monotonic() > end:
                raise TimeoutError(f"{self.launched} launches, and not all layers were served")


def resident_figures(gpu: Gpu, layers: Any) -> list[Figure]:
    resident = Resident(gpu, layers)
    number, read = layers.loaded.spec.num_layers, layers.bytes_read()
    gpu.eager(layers.launch)()
    gpu.device.run(gpu.stream, resident.ask)
    resident.follow()
    gpu.device.finish()
    same = torch.equal(resident.out, layers.out)
    assert torch.allclose(resident.out, layers.out, rtol=2e-2, atol=2e-2), "it is not what launches compute"
    replay = recorded_asks(gpu, resident)

    def round_trip() -> None:
        replay()
        resident.follow()

    seconds = gpu.seconds(round_trip) / number
    return [
        *gpu.bandwidth_figures("resident, a layer", read / number, seconds, None),
        Figure("resident, a layer: equal to the last bit", float(same), ""),
    ]


def recorded_asks(gpu: Gpu, resident: Resident) -> Any:
    """The graph of all layers. Recording runs them once more, while nobody follows: so the resident kernel is
    there before."""
    resident.launch()
    return gpu.recorded(resident.ask)
