"""Tiny models under the real executor, with grants made by hand: no scheduler, no pools."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crosspool.backends.factory import make_backends
from crosspool.core.batch import Event, Grant, Phase, RetiredEvent, Row, TokenChoice, TokenEvent
from crosspool.core.copies import CopiedEvent
from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import CopyId, GrantId, KvDevice, ModelIndex, Nanoseconds, PageId, RequestId
from crosspool.core.kv_layout import KvLayout, make_layout
from crosspool.core.protocols import Executor
from crosspool.core.sampling import SamplingParams
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Sharding, Topology
from crosspool.models.checkpoint import Checkpoint
from crosspool.models.loader import load_attention_side, load_ffn
from crosspool.models.moe_decoder import AttentionSide, AttentionSideWeights, FfnWeights, shard_ffn
from crosspool.models.registry import read_spec
from crosspool.workers.attention import AttentionWorker
from crosspool.workers.clock import MonotonicClock
from crosspool.workers.executor import ThreadedExecutor
from crosspool.workers.ffn import FfnWorker, WeightRow, WeightTable
from crosspool.workers.resident.executor import ResidentExecutor
from crosspool.workers.resident.model import ResidentModel

PROMPTS = [[5, 17, 3], list(range(1, 40)), [9], [60, 61, 62, 63, 64, 65, 66, 67]]
GQA, MLA = 0, 1
PLACEMENTS = {
    "one device": {},
    "two devices": {"weights_devices": ["cpu:1"]},
    "one KV, four weights, by layer": {"weights_devices": ["cpu:1", "cpu:2", "cpu:3", "cpu:4"]},
    "one KV, four weights, by tensor": {
        "weights_devices": ["cpu:1", "cpu:2", "cpu:3", "cpu:4"],
        "sharding": Sharding.TENSOR,
    },
    "two KV, two weights": {"kv_devices": ["cpu:0", "cpu:1"], "weights_devices": ["cpu:2", "cpu:3"]},
    "shared devices, by tensor": {
        "kv_devices": ["cpu:0", "cpu:1"],
        "weights_devices": ["cpu:1", "cpu:0"],
        "sharding": Sharding.TENSOR,
    },
}

PAGE_BYTES = 8192
NUM_PAGES = 200
PATIENCE = 60.0
"""Seconds until a test gives up waiting for an event that must come."""


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint in memory."""

    spec: ModelSpec
    layout: KvLayout
    weights: AttentionSideWeights
    ffns: tuple[FfnWeights, ...]

    @staticmethod
    def load(folder: Path, dtype: str = "auto") -> TinyModel:
        spec, checkpoint = read_spec(folder, dtype), Checkpoint(folder)
        return TinyModel(
            spec,
            make_layout(spec, PAGE_BYTES),
            load_attention_side(spec, checkpoint),
            tuple(load_ffn(spec, checkpoint, layer) for layer in range(spec.num_layers)),
        )


@dataclass
class HandMade:
    """One request as a scheduler would know it."""

    id: RequestId
    model: ModelIndex
    device: KvDevice
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    stops: frozenset[int]
    pages: tuple[tuple[PageId, ...], ...]
    computed: int = 0
    output: list[int] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)

    def row(self, tokens: int, steps: int) -> Row:
        """The next ``tokens`` known tokens, and ``steps`` tokens to make."""
        known = (*self.prompt, *self.output)
        stop = self.computed + tokens
        choice = TokenChoice(
            params=self.params,
            seed=11 + self.id,
            output_index=len(self.output),
            remaining=self.max_tokens - len(self.output),
            stop_token_ids=self.stops,
            prompt=self.prompt if self.params.penalised else (),
            output=tuple(self.output) if self.params.penalised else (),
        )
        return Row(
            self.id, self.computed, known[self.computed : stop], self.pages, choice if steps else None, steps
        )


class Rig:
    """An executor and its arena, which starts full of bytes that are not a number in any dtype."""

    def __init__(
        self,
        models: Sequence[TinyModel],
        kv_devices: Sequence[str] = ("cpu:0",),
        weights_devices: Sequence[str] = ("cpu:0",),
        sharding: Sharding = Sharding.LAYER,
        *,
        resident: bool = False,
        threads: int = 1,
        tasks: int | None = None,
    ) -> None:
        self.models = models
        topology = Topology(tuple(kv_devices), tuple(weights_devices), sharding)
        self.places = DevicePages.of([NUM_PAGES + device for device in range(len(kv_devices))])
        self.arena = torch.full((self.places.total, PAGE_BYTES), 255, dtype=torch.uint8)
        self.executor = self._make(topology, resident, threads, tasks)
        self.free = [list(self.places.pages_of(device)) for device in self.places.devices]
        for device, pages in enumerate(self.free):
            random.Random(device).shuffle(pages)
        self.sequences: dict[RequestId, HandMade] = {}
        self.retired: dict[GrantId, RetiredEvent] = {}
        self.copied: dict[CopyId, CopiedEvent] = {}
        self._rows: dict[GrantId, list[tuple[HandMade, int]]] = {}

    def _make(self, topology: Topology, resident: bool, threads: int, tasks: int | None) -> Executor:
        make = self._resident if resident else self._threaded
        return make(topology, make_backends(topology.teams, threads), tasks)

    def _shards(self, topology: Topology) -> Iterator[tuple[int, int, int, int, FfnWeights]]:
        """(model, layer, part, device, weights of the part) of every FFN's every part."""
        for index, model in enumerate(self.models):
            for layer, weights in enumerate(model.ffns):
                devices = topology.ffn_devices(layer, KvDevice(0))
                for part, device in enumerate(devices):
                    yield index, layer, part, device, shard_ffn(weights, part, len(devices))

    def _resident(self, topology: Topology, backends, tasks: int | None) -> ResidentExecutor:
        parts = topology.ffn_parts
        models = [ResidentModel(m.spec, m.layout, m.weights, parts=parts) for m in self.models]
        for model, layer, part, _, _ in self._shards(topology):
            models[model].put_ffn(layer, part, self.models[model].ffns[layer])
        return ResidentExecutor(
            topology,
            backends,
            self.arena,
            self.places,
            {ModelIndex(i): model for i, model in enumerate(models)},
            most_tokens=512,
            most_rows=32,
            tasks=tasks,
        )

    def _threaded(self, topology: Topology, backends, tasks: int | None) -> ThreadedExecutor:
        models = self.models
        attention = [
            AttentionWorker(
                {ModelIndex(i): AttentionSide(m.spec, m.layout, m.weights) for i, m in enumerate(models)},
                self.arena,
            )
            for _ in self.places.devices
        ]
        tables = [WeightTable() for _ in topology.weights_devices]
        for index, layer, _, device, shard in self._shards(topology):
            row = WeightRow(models[index].spec.layers[layer].ffn, shard)
            tables[device].put(ModelIndex(index), layer, row)
        return ThreadedExecutor(
            topology,
            backends,
            attention,
            [FfnWorker(table) for table in tables],
            {ModelIndex(i): model.spec.num_layers for i, model in enumerate(models)},
            MonotonicClock(),
        )

    def sequence(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        model: int = 0,
        device: int = 0,
        lent: Callable[[int], int] | None = None,
        params: SamplingParams | None = None,
        stops: Sequence[int] = (),
    ) -> HandMade:
        """``device`` is its home; ``lent`` says on which device the pages of each chunk are, if not there."""
        layout = self.models[model].layout
        chunks = layout.chunks(len(prompt) + max_tokens)
        where = [device if lent is None else lent(chunk) for chunk in range(chunks)]
        pages = tuple(tuple(PageId(self.free[place].pop()) for place in where) for _ in layout.groups)
        new = HandMade(
            RequestId(len(self.sequences)),
            ModelIndex(model),
            KvDevice(device),
            tuple(prompt),
            params or SamplingParams(temperature=0, max_tokens=None),
            max_tokens,
            frozenset(stops),
            pages,
        )
        self.sequences[new.id] = new
        return new

    def grant(self, phase: Phase, rows: Sequence[tuple[HandMade, int, int]]) -> GrantId:
        """Submit one micro-batch of (sequence, tokens, steps)."""
        first = rows[0][0]
        devices = {self.places.device_of(page) for s, *_ in rows for group in s.pages for page in group}
        grant = Grant(
            id=GrantId(len(self._rows)),
            model=first.model,
            phase=phase,
            kv_device=first.device,
            rows=tuple(sequence.row(tokens, steps) for sequence, tokens, steps in rows),
            steps=max(1, max(steps for _, _, steps in rows)),
            start_by=Nanoseconds(0),
            interval=Nanoseconds(0),
            layer_cost=Nanoseconds(1000),
            elsewhere=tuple(sorted(devices - {first.device})),
        )
        self._rows[grant.id] = [(sequence, tokens) for sequence, tokens, _ in rows]
        self.executor.submit(grant)
        return grant.id

    def prefill(self, *sequences: HandMade) -> GrantId:
        """All known tokens in one chunk, and the first new one."""
        rows = [(s, len(s.prompt) + len(s.output) - s.computed, 1) for s in sequences]
        return self.grant(Phase.PREFILL, rows)

    def decode(self, steps: int, *sequences: HandMade) -> GrantId:
        return self.grant(Phase.DECODE, [(s, 1, min(steps, s.max_tokens - len(s.output))) for s in sequences])

    def take(self) -> list[Event]:
        """What has come by now, noted in the sequences."""
        events = self.executor.poll()
        for event in events:
            if isinstance(event, TokenEvent):
                sequence = self.sequences[event.request]
                assert event.grant not in self.retired, "a token came after its grant retired"
                sequence.output.append(event.token)
                sequence.events.append(event)
            elif isinstance(event, CopiedEvent):
                assert event.copy not in self.copied, "a copy was over twice"
                self.copied[event.copy] = event
            else:
                assert event.grant not in self.retired, "a grant retired twice"
                self.retired[event.grant] = event
                for sequence, tokens in self._rows[event.grant]:
                    made = sum(1 for e in sequence.events if e.grant == event.grant)
                    sequence.computed += tokens + max(0, made - 1)
        return events

    def finish(self, *grants: GrantId) -> list[RetiredEvent]:
        """Wait until these grants have retired."""
        clock = MonotonicClock()
        limit = clock.now() + PATIENCE * 1e9
        while not self.retired.keys() >= set(grants):
            assert clock.now() < limit, f"grants {set(grants) - self.retired.keys()} did not retire"
            self.executor.wait(PATIENCE)
            self.take()
        return [self.retired[grant] for grant in grants]

    def run(self, *sequences: HandMade, steps: int = 4) -> list[list[int]]:
        """Prefill each sequence alone, then decode all together to their ends. Returns their outputs."""
        self.finish(*[self.prefill(sequence) for sequence in sequences])
        while going := [s for s in sequences if s.events[-1].finish is None]:
            self.finish(self.decode(steps, *going))
        return [sequence.output for sequence in sequences]


@contextmanager
def rig(*models: TinyModel, **how: object) -> Iterator[Rig]:
    """A rig that is closed at the end and must leave no thread behind."""
    before = set(threading.enumerate())
    made = Rig(models, **how)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.executor.close()
    assert set(threading.enumerate()) <= before, "the executor left threads behind"


class Gate:
    """Stands before an FFN worker: holds its tasks until opened, and lets chosen ones fail.

    ``seen`` is (model, layer, tokens) of every task.
    """

    def __init__(self, worker) -> None:
        self.worker = worker
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.fails = lambda model, layer: False
        self.seen = []

    def ffn(self, model, layer, hidden):
        self.seen.append((model, layer, len(hidden)))
        self.reached.set()
        assert self.opened.wait(60)
        if self.fails(model, layer):
            raise RuntimeError("secret detail")
        return self.worker.ffn(model, layer, hidden)


def gated(it, device: int = 0) -> Gate:
    gate = Gate(it.executor._ffn[device])
    it.executor._ffn[device] = gate
    return gate


class HeadGate:
    """Stands before an attention worker: holds each head's tokens until opened."""

    def __init__(self, worker) -> None:
        self.attention, self.worker = worker.attention, worker
        self.opened = threading.Event()
        self.reached = threading.Event()

    def head(self, state):
        chosen = self.worker.head(state)
        self.reached.set()
        assert self.opened.wait(60)
        return chosen
