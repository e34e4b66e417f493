"""Grants over devices whose streams run in any order: every request says what it says alone, whatever is
cancelled, recalled, or reused meanwhile. And what must not be left out, cannot be."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from crosspool.core.batch import Grant, Phase, RetiredEvent, Row, TokenChoice, TokenEvent
from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, PageId, RequestId
from crosspool.core.kv_layout import KvLayout, LayerGroup
from crosspool.core.request import FinishReason
from crosspool.core.sampling import SamplingParams
from crosspool.core.spec import DType, FfnSpec, GqaSpec, LayerSpec, ModelSpec, RopeSpec
from crosspool.core.topology import Sharding, Topology
from crosspool.kernels.triton.states import States
from crosspool.workers.cuda.attention import KvPages
from crosspool.workers.cuda.feeder import FAILED, Feeder, routes_of
from crosspool.workers.cuda.flight import Flight
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.grant import GrantMemory, Span
from crosspool.workers.cuda.home import GrantLimits, Home, HomePlan, LanesOf
from crosspool.workers.cuda.lane_pass import LanePass
from crosspool.workers.cuda.lanes import Lane
from crosspool.workers.cuda.spread import Other
from helpers_fake_devices import VOCAB, FakeDevice, FakeEvent, Oracle, World
from helpers_fake_spread import FakeElsewhere, SpreadSides

pytestmark = pytest.mark.backend

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
    "two devices": Topology(("a",), ("b",)),
    "by layer": Topology(("a",), ("b", "a")),
    "by tensor": Topology(("a",), ("b", "c", "a"), Sharding.TENSOR),
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


class Clock:
    """Time goes on a little whenever somebody asks."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> Nanoseconds:
        self.time += 7
        return Nanoseconds(self.time)


class Life:
    """A random scheduler over a feeder: who lives, dies and returns is drawn from ``rng``."""

    def __init__(self, seed: int, topology: Topology) -> None:
        self.rng = random.Random(seed)
        self.world = World(self.rng)
        self.topology = topology
        self.devices = [FakeDevice(name, self.world) for name in topology.teams]
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
            sides, lanes = SpreadSides(numbers), LanesOf(2, 2)
            plan = HomePlan(home, self.devices, keys, LIMITS, topology.ffn_parts, lanes, sides)
            self.homes.append(Home(plan, self.kv, dict.fromkeys(keys, self.models[ModelIndex(0)])))
        self.devices[0].finish()
        self.feeder = Feeder(topology, self.homes, self.models, LIMITS, Clock())
        self.free = [PageId(page) for page in range(self.places.total)]
        self.sequences: dict[RequestId, Sequence] = {}
        self.grants: dict[GrantId, list[tuple[Sequence, int]]] = {}
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
        """Its pages are anybody's now."""
        self.free += sequence.pages
        for page in sequence.pages:
            own = self.kv[self.places.device_of(page)]
            own.arena[page - own.first] = 255
        del self.sequences[sequence.id]

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
        quiet = 0
        while quiet < 30:
            self._submit()
            moved = self.feeder.step() | self.world.step()
            self._take()
            quiet = 0 if moved or self.sequences else quiet + 1
            assert quiet or moved or any(not s.busy for s in self.sequences.values()), "nothing moves"
        assert self.feeder.idle and sorted(self.free) == list(range(self.places.total))
        for home in self.homes:
            idle = 256 * len(home.lanes) * (1 if len(self.homes) == 1 else 2)
            assert home.memory.free_bytes == len(home.memory.host) - idle


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_everybody_says_what_they_say_alone(placement: str) -> None:
    for seed in range(60):
        life = Life(seed, PLACEMENTS[placement])
        life.live(600)
        life.finish()
        assert set(life.errors) == {None} and len(life.errors) > 10


# -- what must not be left out -----------------------------------------------------------------------------


def without_waits(patch: pytest.MonkeyPatch, device: str, of: str | None = None) -> None:
    """``device`` waits for no events, or for none of one other."""
    wait = FakeDevice.wait

    def some(self: FakeDevice, stream: object, event: FakeEvent) -> None:
        if self.name != device or of not in (None, event.device):
            wait(self, stream, event)

    patch.setattr(FakeDevice, "wait", some)


def with_memory_given_back_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """Although empty passes of the grant are still in a stream."""
    retire = Feeder._retire

    def early(self: Feeder, flight: Flight) -> None:
        retire(self, flight)
        self._homes[0].memory.give_back(flight.packed.span)

    patch.setattr(Feeder, "_retire", early)
    patch.setattr(GrantMemory, "give_back", _once(GrantMemory.give_back))


def _once(give_back: Callable[[GrantMemory, Span], None]) -> Callable[[GrantMemory, Span], None]:
    given: list[Span] = []

    def once(self: GrantMemory, span: Span) -> None:
        if span in given:
            given.remove(span)
        else:
            given.append(span)
            give_back(self, span)

    return once


MUTATIONS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "weights do not wait for the home": ("two devices", lambda patch: without_waits(patch, "b")),
    "the home does not wait for weights": ("two devices", lambda patch: without_waits(patch, "a")),
    "one of three parts is not waited for": (
        "by tensor",
        lambda patch: patch.setattr(
            FakeDevice, "wait", _unless(FakeDevice.wait, lambda self, _, event: event.device == "c")
        ),
    ),
    "numbers of rows are told once": (
        "two devices",
        lambda patch: patch.setattr(LanePass, "attention", _keeping_told(LanePass.attention)),
    ),
    "other KV devices do not wait for the home": (
        "two KV devices",
        lambda patch: without_waits(patch, "b", of="a"),
    ),
    "the home does not wait for other KV devices": (
        "two KV devices",
        lambda patch: without_waits(patch, "a", of="b"),
    ),
    "page tables are told once": (
        "two KV devices",
        lambda patch: patch.setattr(Other, "_tell", _once_each(Other._tell)),
    ),
    "other KV devices take the home's page tables": (
        "two KV devices",
        lambda patch: patch.setattr(FakeElsewhere, "begin", lambda self: None),
    ),
    "states of one of two other devices are left out": (
        "three KV devices, by tensor",
        lambda patch: patch.setattr(Flight, "launch", _asking(lambda others: others[:1])),
    ),
    "what is not asked is not forgotten": (
        "three KV devices, by tensor",
        lambda patch: patch.setattr(States, "clear", lambda self: None),
    ),
    "a grant's words are not copied": (
        "one device",
        lambda patch: patch.setattr(Lane, "bind", _without_copy(Lane.bind)),
    ),
    "a lane keeps the grant that it had": (
        "one device",
        lambda patch: patch.setattr(
            Lane, "_enter", _unless(Lane._enter, lambda self, _: self._entered is not None)
        ),
    ),
    "chunks share a lane": (
        "one device",
        lambda patch: patch.setattr(Lane, "may_bind", property(lambda self: self.has_place)),
    ),
    "a grant is over when all of it is put": (
        "one device",
        lambda patch: patch.setattr(Flight, "ended", property(lambda self: not self.goes_on)),
    ),
    "a grant's memory is another's while it is queued": ("one device", with_memory_given_back_at_the_end),
    "whatever is put has run": (
        "one device",
        lambda patch: patch.setattr(FakeEvent, "done", lambda self: True),
    ),
}


def _unless(method: Callable[..., None], condition: Callable[..., bool]) -> Callable[..., None]:
    def guarded(*arguments: object) -> None:
        if not condition(*arguments):
            method(*arguments)

    return guarded


def _once_each(tell: Callable[[Other, object], None]) -> Callable[[Other, object], None]:
    told: set[tuple[int, int]] = set()

    def once(self: Other, home: object) -> None:
        key = (id(self.side), len(self.side.normed))
        if key not in told:
            told.add(key)
            tell(self, home)

    return once


def _asking(choose: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[Flight], None]:
    launch = Flight.launch

    def some(self: Flight) -> None:
        self.others = choose(self.others)
        launch(self)

    return some


def _keeping_told(attention: Callable[..., None]) -> Callable[..., None]:
    def keeping(self: LanePass, layer: int) -> None:
        told = set(self._told)
        attention(self, layer)
        self._told.update(told)

    return keeping


def _without_copy(bind: Callable[..., None]) -> Callable[..., None]:
    def without(self: Lane, flight: Flight) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeDevice, "copy", lambda *_: None)
            bind(self, flight)

    return without


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_it_is_seen_if(mutation: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    placement, mutate = MUTATIONS[mutation]
    mutate(monkeypatch)
    with pytest.raises((AssertionError, KeyError, ValueError, IndexError)), caplog.at_level(logging.CRITICAL):
        for seed in range(60):
            life = Life(seed, PLACEMENTS[placement])
            life.live(600)
            life.finish()


# -- failures ----------------------------------------------------------------------------------------------


def test_what_cannot_be_launched_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Each fails at a random launch; whoever is beside it says what they say alone."""
    failed = 0
    for seed in range(20):
        life = Life(seed, PLACEMENTS["two devices"])
        launch, rng = Flight.launch, random.Random(seed)

        def failing(flight: Flight, launch=launch, rng=rng) -> None:
            launch(flight)
            if rng.random() < 0.05:
                raise RuntimeError("no such kernel")

        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.CRITICAL):
            patch.setattr(Flight, "launch", failing)
            life.live(500)
        life.finish()
        failed += sum(error is not None for error in life.errors)
    assert failed > 10


def test_a_lost_device_ends_what_is_at_home_there_and_what_comes(caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(20):
        life = Life(seed, PLACEMENTS["two devices"])
        life.live(300)
        retired = len(life.errors)
        life.world.lost.add(random.Random(seed).choice("ab"))
        with caplog.at_level(logging.CRITICAL):
            for _ in range(20):
                life.live(20)
        life.feeder.step()
        life._take()
        assert life.feeder.broken is not None and life.feeder.idle
        assert len(life.errors) == len(life.grants)
        assert set(life.errors[retired:]) <= {None, FAILED}
        life._arrive()
        grants = len(life.grants)
        while len(life.grants) == grants:
            life._arrive()
            life._submit()
        assert isinstance(life.feeder.take_events()[-1], RetiredEvent)


def test_a_lost_kv_device_ends_what_goes_there_and_lets_others_end(caplog: pytest.LogCaptureFixture) -> None:
    """Its streams stand still, and so do those that wait for them. Nothing begins any more, and when all that
    goes on has ended, nothing can be relied on."""
    went_on = failed = 0
    for seed in range(60):
        life = Life(seed, PLACEMENTS["two KV devices"])
        life.live(200)
        life.world.lost.add("b")
        flights = list(life.feeder._flights.values())
        visited = any(flight.others for flight in flights)
        there = any(flight.grant.kv_device == 1 and flight.queued for flight in flights)
        with caplog.at_level(logging.CRITICAL):
            for _ in range(600):
                life.world.step()
                life.feeder.step()
                life._take()
        assert life.feeder.idle and len(life.ends) == len(life.grants)
        assert (life.feeder.broken is not None) or not (visited or there)
        for flight in flights:
            error = life.ends[flight.grant.id]
            if flight.grant.kv_device == 0 and not visited:
                assert error is None
                went_on += 1
            failed += error == FAILED
        if life.feeder.broken is not None:
            grants = len(life.grants)
            while len(life.grants) == grants:
                life._arrive()
                life._submit()
            assert life.feeder.take_events()[-1].error == FAILED
    assert went_on > 5 and failed > 50
