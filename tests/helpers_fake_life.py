"""Random lives of sequences over a feeder of devices that run in any order: tiny requests of which everybody
must say what they would say alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from crosspool.core.batch import Grant, Phase, RetiredEvent, Row, TokenChoice, TokenEvent
from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, PageId, RequestId
from crosspool.core.kv_layout import KvLayout, LayerGroup
from crosspool.core.request import FinishReason
from crosspool.core.sampling import SamplingParams
from crosspool.core.spec import DType, FfnSpec, GqaSpec, LayerSpec, ModelSpec, RopeSpec
from crosspool.core.topology import Sharding, Topology
from crosspool.workers.cuda.attention import KvPages
from crosspool.workers.cuda.feeder import Feeder, routes_of
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.home import GrantLimits, Home, HomePlan, LanesOf
from helpers_fake_devices import (
    VOCAB,
    FakeDevice,
    Oracle,
    World,
)
from helpers_fake_spread import SpreadSides

TOKENS_PER_PAGE, LAYERS, PAGES = 2, 2, 40
PAGE_BYTES = 8 * TOKENS_PER_PAGE * LAYERS
LAYOUT = KvLayout(PAGE_BYTES, TOKENS_PER_PAGE, (LayerGroup((0, 1), None),), 8, (0, 0), (0, 0))
SPEC = ModelSpec(
    architecture="Fake",
    hidden_size=2,
    vocab_size=VOCAB,
    max_context=24,
    layers=(LayerSpec(FfnSpec(2)),) * LAYERS,
    attention=GqaSpec(1, 1, 2, 1.0),
    rope=RopeSpec(2, 1e4),
    norm_eps=1e-6,
    tied_embeddings=False,
    dtype=DType.FLOAT32,
)
LIMITS = GrantLimits(decode_rows=3, prefill_rows=2, prefill_tokens=16, steps=6, sequences=12)
PLACEMENTS = {
    "one device": Topology(("a",), ("a",)),
    "one device, loops": Topology(("a",), ("a",)),
    "two devices": Topology(("a",), ("b",)),
    "two that reach nobody": Topology(("A",), ("B",)),
    "two of one chip": Topology(("a/0",), ("a/1",)),
    "by layer": Topology(("a",), ("b", "a")),
    "by tensor": Topology(("a",), ("b", "c", "a"), Sharding.TENSOR),
    "by tensor, in three ways": Topology(("a/0",), ("B", "a/1", "c"), Sharding.TENSOR),
    "by tensor, two of one chip": Topology(("a",), ("b/0", "b/1"), Sharding.TENSOR),
    "two KV devices": Topology(("a", "b"), ("c",)),
    "two of everything": Topology(("a", "b"), ("b", "a")),
    "three KV devices, by tensor": Topology(("a", "b", "c"), ("c", "d"), Sharding.TENSOR),
}


@dataclass(frozen=True)
class FakeModel:
    """What the feeder wants of a DeviceModel."""

    geometry: Geometry
    homes: tuple[int, ...]
    number: int

    def lane_words(self, team: int) -> list[int]:
        return [self.layers(team), 0, 0, 0, 0]

    def layers(self, team: int) -> int:
        return 1000 * (team + 1) + self.number


@dataclass
class Sequence:
    """One request. ``pages`` and ``busy`` are given back when its grant has retired."""

    id: RequestId
    model: int
    home: KvDevice
    prompt: list[int]
    wanted: int
    oracle: Oracle
    pages: list[PageId]
    said: list[int] = field(default_factory=list)
    computed: int = 0
    busy: bool = False
    cancelled: bool = False
    expected: list[int] = field(default_factory=list)

    @property
    def known(self) -> list[int]:
        return self.prompt + self.said


MOST_STEPS = 20_000


class Clock:
    """Time goes on a little whenever somebody asks."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> Nanoseconds:
        self.time += 7
        return Nanoseconds(self.time)


class Life:
    """A random scheduler over a feeder: who lives, dies and returns is drawn from ``rng``."""

    def __init__(self, seed: int, placement: str, decode_lanes: int = 2, *, queues: bool = False) -> None:
        self.rng = random.Random(seed)
        self.world = World(self.rng)
        self.world.queues = {} if queues else None
        self.topology = topology = PLACEMENTS[placement]
        self.loops = placement.endswith("loops")
        self.devices = [FakeDevice(name, self.world, loops=self.loops) for name in topology.teams]
        geometry = Geometry(SPEC, LAYOUT, 1.0)
        teams = tuple(range(len(topology.kv_devices)))
        self.models = {ModelIndex(n): FakeModel(geometry, teams, n) for n in range(2)}
        numbers = {
            m.layers(team): m.number for m in self.models.values() for team in range(len(self.devices))
        }
        self.places = DevicePages.of([PAGES + team for team in teams])
        self.kv = {
            team: KvPages(
                torch.full((PAGES + team, PAGE_BYTES // 8), -1, dtype=torch.int64).view(torch.uint8),
                self.places.starts[team],
            )
            for team in teams
        }
        self.homes = []
        for home in self.places.devices:
            keys = [(geometry, route) for route in routes_of(topology, home, LAYERS)]
            sides, own = SpreadSides(numbers, self.world), LanesOf(decode_lanes, 2)
            plan = HomePlan(home, self.devices, keys, LIMITS, topology.ffn_parts, own, sides)
            self.homes.append(Home(plan, self.kv, dict.fromkeys(keys, self.models[ModelIndex(0)])))
        self.devices[0].finish()
        self.feeder = Feeder(topology, self.homes, self.models, LIMITS, Clock())
        self.free = [PageId(page) for page in range(self.places.total)]
        self.sequences: dict[RequestId, Sequence] = {}
        self.grants: dict[GrantId, list[tuple[Sequence, int]]] = {}
        self.phases: dict[GrantId, Phase] = {}
        self.times: list[int] = []
        self.silence = False
        self.ends: dict[GrantId, str | None] = {}
        self._next = 0

    @property
    def errors(self) -> list[str | None]:
        return list(self.ends.values())

    def _arrive(self) -> None:
        prompt = [self.rng.randrange(VOCAB) for _ in range(self.rng.randrange(1, 9))]
        wanted = self.rng.randrange(1, 12)
        needed = LAYOUT.chunks(len(prompt) + wanted)
        if needed > len(self.free) or len(self.sequences) >= LIMITS.sequences:
            return
        self.rng.shuffle(self.free)
        home = self.rng.choice(self.places.devices)
        if self.rng.random() < 0.5:
            # As much of it as there is room for is at home.
            self.free.sort(key=lambda page: self.places.device_of(page) != home)
        pages, self.free = self.free[:needed], self.free[needed:]
        self._next += 1
        model = self.rng.randrange(2)
        oracle = Oracle(model, LAYERS, self.topology.ffn_parts)
        new = Sequence(RequestId(self._next), model, home, prompt, wanted, oracle, pages)
        inputs = prompt
        for _ in range(wanted):
            new.expected.append(oracle.next(inputs))
            inputs = new.expected[-1:]
        self.sequences[new.id] = new

    def _row(self, sequence: Sequence, tokens: int, steps: int) -> Row:
        params = SamplingParams(temperature=0, max_tokens=None)
        remaining = sequence.wanted - len(sequence.said)
        choice = TokenChoice(params, 0, len(sequence.said), remaining, frozenset()) if steps else None
        begin = sequence.computed
        inputs = tuple(sequence.known[begin : begin + tokens])
        return Row(sequence.id, begin, inputs, (tuple(sequence.pages),), choice, steps)

    def _submit(self) -> None:
        model, home = self.rng.randrange(2), self.rng.choice(self.places.devices)
        idle = [s for s in self.sequences.values() if not s.busy and s.model == model and not s.cancelled]
        idle = [s for s in idle if len(s.said) < s.wanted and s.home == home]
        self.rng.shuffle(idle)
        phase = self.rng.choice((Phase.DECODE, Phase.PREFILL))
        if phase is Phase.DECODE:
            ready = [s for s in idle if len(s.known) - s.computed == 1 and s.said][: LIMITS.decode_rows]
            steps = self.rng.randrange(1, LIMITS.steps + 1)
            parts = [(s, 1, min(steps, s.wanted - len(s.said))) for s in ready]
        else:
            ready = [s for s in idle if len(s.known) - s.computed > 1 or not s.said][: LIMITS.prefill_rows]
            parts = []
            for s in ready:
                left = len(s.known) - s.computed
                tokens = self.rng.randrange(1, min(left, 8) + 1)
                parts.append((s, tokens, int(tokens == left)))
        if not parts:
            return
        rows = tuple(self._row(s, tokens, steps) for s, tokens, steps in parts)
        grant_id = GrantId(len(self.grants))
        start = Nanoseconds(self.rng.randrange(2000))
        # Passes for nothing are what a stop token before the last step leaves.
        steps = max(1, *(row.steps for row in rows), 1) + (phase is Phase.DECODE) * self.rng.choice((0, 2))
        interval = Nanoseconds(self.rng.randrange(500))
        holding = {self.places.device_of(page) for s, *_ in parts for page in s.pages} - {home}
        elsewhere, cost = tuple(sorted(holding)), Nanoseconds(50)
        grant = Grant(grant_id, ModelIndex(model), phase, home, rows, steps, start, interval, cost, elsewhere)
        self.grants[grant_id] = [(s, tokens) for s, tokens, _ in parts]
        self.phases[grant_id] = phase
        for s, _, _ in parts:
            s.busy = True
        self.feeder.submit(grant)

    def _disturb(self) -> None:
        if self.sequences and self.rng.random() < 0.5:
            victim = self.rng.choice(list(self.sequences.values()))
            victim.cancelled = True
            self.feeder.cancel(victim.id)
            if not victim.busy:
                self._end(victim)
        elif self.grants:
            self.feeder.recall(self.rng.choice(list(self.grants)))

    def _end(self, sequence: Sequence) -> None:
        self._give_pages_back(sequence)
        del self.sequences[sequence.id]

    def _give_pages_back(self, sequence: Sequence) -> None:
        """They are anybody's now."""
        self.free += sequence.pages
        for page in sequence.pages:
            own = self.kv[self.places.device_of(page)]
            own.arena[page - own.first] = 255
        sequence.pages = []

    def _take(self) -> None:
        for event in self.feeder.take_events():
            if isinstance(event, TokenEvent):
                own = self.sequences[event.request]
                assert own.busy and not own.cancelled
                own.said.append(event.token)
                assert own.said == own.expected[: len(own.said)]
                assert (event.finish is FinishReason.LENGTH) == (len(own.said) == own.wanted)
                own.computed += 1
            else:
                self._retired(event)

    def _retired(self, event: RetiredEvent) -> None:
        self.ends[event.grant] = event.error
        told = not any(own.cancelled for own, _ in self.grants[event.grant])
        if self.phases[event.grant] is Phase.DECODE and told and event.error is None:
            self.times.append(event.layer_times[0])
        for own, tokens in self.grants[event.grant]:
            assert own.busy
            own.busy = False
            # Each token said moves one position on; what was read besides is known too.
            own.computed = max(own.computed, len(own.known) - 1) if own.said else own.computed + tokens
            if own.cancelled or len(own.said) == own.wanted or event.error is not None:
                self._end(own)

    def live(self, steps: int) -> None:
        for _ in range(steps):
            draw = self.rng.random()
            if draw < 0.08:
                self._arrive()
            elif draw < 0.2:
                self._submit()
            elif draw < 0.23:
                self._disturb()
            elif draw < 0.5:
                self.feeder.step()
                self._take()
            else:
                self.world.step()

    def finish(self) -> None:
        """Everybody comes to an end."""
        quiet, steps = 0, 0
        while quiet < 30:
            steps += 1
            assert steps < MOST_STEPS, "it moves and comes to no end"
            self._submit()
            moved = self.feeder.step() | self.world.step()
            self._take()
            quiet = 0 if moved or self.sequences else quiet + 1
            assert quiet or moved or any(not s.busy for s in self.sequences.values()), "nothing moves"
        assert self.silence or self.world.lost_patience == 0
        assert self.feeder.idle and sorted(self.free) == list(range(self.places.total))
        for home in self.homes:
            idle = 256 * len(home.lanes) * (1 if len(self.homes) == 1 else 2)
            assert home.memory.free_bytes == len(home.memory.host) - idle
