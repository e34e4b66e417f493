"""Devices that run what is in their streams some time, in any order that streams and events allow; and a
model of which every value depends on all that came before it, so that whatever is read too early, or written
too late, changes the tokens.

The model's hidden states are pairs of whole numbers, kept in float32 exactly. In a layer, attention mixes a
token's state with what is in the pages at this position and the one before, and the FFN with the number of
the model, which is what its layers' words lead to.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.core.errors import DeviceError
from crosspool.kernels.triton import grant_words as g
from crosspool.kernels.triton import words as w
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.crossing import RAISED, TAKEN, Carried, Flag
from crosspool.kernels.triton.tiles import Chip
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import HiddenStates, Limits, Ring, carve_hidden, carve_pass
from crosspool.workers.cuda.room import Room
from helpers_devices import aligned_bytes

PRIME = 65_521
VOCAB = 50
ROUND_TIME = 1000


def chip_of(device: str) -> str:
    return device.partition("/")[0]


class NotYetError(Exception):
    """A kernel waits for a flag."""


class World:
    """All streams of all devices. ``step`` runs one thing that may run now, chosen at random. Where all that
    could run waits for flags, one of them loses its patience, which is counted; ``waiting`` is the device on
    which one waited last. Those that are ``silent`` run nothing. ``calls`` counts what the host has asked of
    devices. With ``queues``, all streams of a chip share one, in which everything waits for all that was put
    into it before."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.streams: list[FakeStream] = []
        self.lost: set[str] = set()
        self.silent: set[str] = set()
        self.capture: Capture | None = None
        self.impatient = False
        self.lost_patience = 0
        self.waiting: str | None = None
        self.calls = 0
        self.queues: dict[str, deque[Node]] | None = None

    def step(self) -> bool:
        """Whether there was anything."""
        able = [(stream, node) for stream in self.streams for node in stream.able]
        able = [(stream, node) for stream, node in able if node.device not in self.silent | self.lost]
        if self.queues is not None:
            able = [(stream, node) for stream, node in able if self._is_first(node)]
        self.rng.shuffle(able)
        for stream, node in able:
            if stream.run(node):
                return True
            self.waiting = node.device
        if able:
            self.lost_patience += 1
            self.impatient = True
            stream, node = able[0]
            assert stream.run(node)
            self.impatient = False
        return bool(able)

    def queue(self, nodes: list[Node]) -> list[Node]:
        for node in nodes if self.queues is not None else ():
            self.queues.setdefault(node.chip, deque()).append(node)
        return nodes

    def _is_first(self, node: Node) -> bool:
        assert self.queues is not None
        queue = self.queues[node.chip]
        while queue[0].ran:
            queue.popleft()
        return queue[0] is node


@dataclass(eq=False)
class FakeEvent:
    device: str
    world: World
    happened: bool = False
    rounds: int = 0

    def happen(self, stream: FakeStream) -> None:
        self.happened, self.rounds = True, stream.rounds

    def done(self) -> bool:
        if self.device in self.world.lost:
            raise DeviceError(f"{self.device} is lost")
        return self.happened

    def wait(self) -> None:
        while not self.happened:
            assert self.world.step(), "nothing runs, and an event never happens"

    def since(self, earlier: FakeEvent) -> int:
        """Rounds of loops take so long, and whatever is between two events without loops."""
        assert self.happened and earlier.happened and self.device == earlier.device
        return ROUND_TIME * max(1, self.rounds - earlier.rounds)


@dataclass(eq=False)
class Node:
    """Something on a device that runs once all of ``after`` have: in a stream, the one before and whatever
    the stream has followed; in a graph, what was recorded so."""

    device: str
    work: Callable[[], object] | None
    after: list[Node] = field(default_factory=list)
    ran: bool = False

    @property
    def chip(self) -> str:
        return chip_of(self.device)

    @property
    def ready(self) -> bool:
        return not self.ran and all(node.ran for node in self.after)

    def run(self) -> bool:
        """Whether it did: a kernel that waits does not yet."""
        try:
            if self.work is not None:
                self.work()
        except NotYetError:
            return False
        self.ran = True
        return True


@dataclass(eq=False)
class Capture:
    """What streams have put into the graph that is recorded: of each, what comes next comes ``after``."""

    origin: FakeStream
    nodes: list[Node] = field(default_factory=list)
    after: dict[FakeStream, list[Node]] = field(default_factory=dict)

    def put(self, stream: FakeStream, work: Callable[[], object]) -> None:
        assert stream in self.after, f"{stream.device} has not joined the graph that is recorded"
        node = Node(stream.device, work, self.after[stream])
        self.nodes.append(node)
        self.after[stream] = [node]

    def follow(self, stream: FakeStream, leader: FakeStream) -> None:
        assert leader in self.after, "a stream that is recorded follows one that is not"
        self.after[stream] = [*self.after.get(stream, []), *self.after[leader]]

    def finish(self) -> FakeGraph:
        """As CUDA wants it: nothing is left that the origin does not follow."""
        followed = {node for own in self.nodes for node in own.after} | set(self.after[self.origin])
        assert followed == set(self.nodes), "a stream was not joined"
        return FakeGraph(self.nodes)


@dataclass(eq=False)
class FakeGraph:
    nodes: list[Node]

    def again(self, stream: FakeStream) -> list[Node]:
        """Its nodes, to be run once more."""
        fresh: dict[Node, Node] = {}
        for node in self.nodes:
            fresh[node] = Node(node.device, node.work, [fresh[before] for before in node.after])
        return list(fresh.values())


@dataclass(eq=False)
class FakeLoop:
    """``first``, and then the ``body`` for as long as ``again`` is not 0."""

    first: Callable[[], object]
    body: FakeGraph
    again_word: Tensor

    def again(self, stream: FakeStream) -> list[Node]:
        return [LoopNode(stream.device, None, loop=self, stream=stream)]


@dataclass(eq=False)
class LoopNode(Node):
    """A loop in a stream. Its first launches run in one step of the world, and each round in another."""

    loop: FakeLoop = field(kw_only=True)
    stream: FakeStream = field(kw_only=True)
    inside: bool = False

    def run(self) -> bool:
        if not self.inside:
            self.loop.first()
            self.stream.loops += 1
        else:
            for node in self.loop.body.nodes:
                assert node.work is not None and node.device == self.device, "a body is of one device"
                node.work()
            self.stream.rounds += 1
        self.inside = bool(self.loop.again_word)
        self.ran = not self.inside
        return True


@dataclass(eq=False)
class FakeStream:
    """Its ``work`` goes one after another: each is some nodes, which are a graph. ``loops`` have run in it,
    and have made so many ``rounds``."""

    device: str
    work: deque[list[Node]] = field(default_factory=deque)
    loops: int = 0
    rounds: int = 0

    @property
    def able(self) -> list[Node]:
        """What may run next."""
        return [node for node in self.work[0] if node.ready] if self.work else []

    def run(self, node: Node) -> bool:
        ran = node.run()
        if all(own.ran for own in self.work[0]):
            self.work.popleft()
        return ran


class FakeDevice:
    """What is put into its streams runs when the world steps. ``a/0`` and ``a/1`` are on one chip; others
    reach each other unless their name begins with a capital."""

    def __init__(self, name: str, world: World, *, loops: bool = False) -> None:
        self.name, self.physical = name, chip_of(name)
        self.loops = loops
        self.chip, self.processors = Chip(1 << 16, True), 2
        self.world = world

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return aligned_bytes(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(*shape)

    pinned = tensor

    def stream(self, *, urgent: bool) -> FakeStream:
        self.world.streams.append(FakeStream(self.name))
        return self.world.streams[-1]

    def _put(self, stream: FakeStream, work: Callable[[], object] | None, *after: Node) -> None:
        assert stream.device == self.name
        if self.name in self.world.lost:
            raise DeviceError(f"{self.name} is lost")
        self.world.calls += 1
        if self.world.capture is None:
            stream.work.append(self.world.queue([Node(self.name, work, list(after))]))
        elif work is not None:
            self.world.capture.put(stream, work)

    def run(self, stream: FakeStream, launches: Callable[[], object]) -> None:
        self._put(stream, launches)

    def copy(self, stream: FakeStream, target: Tensor, source: Tensor) -> None:
        self._put(stream, lambda: target.copy_(source))

    def record(self, stream: FakeStream) -> FakeEvent:
        assert self.world.capture is None, "a graph has no events"
        event = FakeEvent(self.name, self.world)
        self._put(stream, partial(event.happen, stream))
        return event

    def follow(self, stream: FakeStream, leader: FakeStream) -> None:
        if self.world.capture is not None:
            self.world.capture.follow(stream, leader)
            return
        self._put(stream, None, *(leader.work[-1] if leader.work else ()))

    def reaches(self, other: FakeDevice) -> bool:
        return self.physical != other.physical and (self.name + other.name).islower()

    def capture(self, stream: FakeStream, launches: Callable[[], object]) -> FakeGraph:
        assert self.world.capture is None and stream.device == self.name
        capture = self.world.capture = Capture(stream, after={stream: []})
        try:
            launches()
        finally:
            self.world.capture = None
        return capture.finish()

    def loop(
        self, stream: FakeStream, first: Callable[[], object], launches: Callable[[], object], again: Tensor
    ) -> FakeLoop:
        assert self.loops
        return FakeLoop(first, self.capture(stream, launches), again)

    def replay(self, stream: FakeStream, graph: FakeGraph | FakeLoop) -> None:
        assert stream.device == self.name and self.world.capture is None
        if self.name in self.world.lost:
            raise DeviceError(f"{self.name} is lost")
        self.world.calls += 1
        stream.work.append(self.world.queue(graph.again(stream)))

    def check(self) -> None:
        if self.name in self.world.lost:
            raise DeviceError(f"{self.name} is lost")

    def finish(self) -> None:
        while self.world.step():
            pass

    def seal(self) -> None:
        pass

    def check_sealed(self) -> None:
        pass


def at(address: int, count: int, kind: type = ctypes.c_int64) -> np.ndarray:
    """Memory at an address."""
    return np.ctypeslib.as_array((kind * count).from_address(int(address)))


# -- the model ---------------------------------------------------------------------------------------------


def mixed(*values: float) -> int:
    total = 7
    for value in values:
        total = (total * 31 + int(value)) % PRIME
    return total


def embedded(token: int) -> tuple[int, int]:
    return mixed(token), mixed(token, 1)


def attended(state: tuple[int, int], layer: int, before: int) -> tuple[tuple[int, int], int]:
    """A state after attention, and what goes into the pages."""
    key = mixed(*state, layer)
    return (mixed(key, before), state[0]), key


def fed(state: tuple[int, int], layer: int, model: int, part: int) -> tuple[int, int]:
    return mixed(*state, layer, model, part), mixed(state[1], part)


def chosen(state: tuple[int, int], position: int) -> int:
    return mixed(*state, position) % VOCAB


@dataclass
class Oracle:
    """What one sequence says, computed alone: keys of each layer by position."""

    model: int
    layers: int
    parts: int
    keys: list[list[int]] = field(default_factory=list)

    def next(self, tokens: Sequence[int]) -> int:
        """The token after these, which follow those before."""
        for token in tokens:
            state, own = embedded(token), list[int]()
            for layer in range(self.layers):
                before = self.keys[-1][layer] if self.keys else 0
                state, key = attended(state, layer, before)
                own.append(key)
                outputs = [fed(state, layer, self.model, part) for part in range(self.parts)]
                state = _sum(state, outputs)
            self.keys.append(own)
        return chosen(state, len(self.keys) - 1)


def _sum(state: tuple[float, float], outputs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    first, second = (sum(values) for values in zip(state, *outputs, strict=True))
    return int(first) % PRIME, int(second) % PRIME


# -- its kernels -------------------------------------------------------------------------------------------


def position_of(batch: Pass, query: int) -> tuple[int, int]:
    """Its row, and where it is in it."""
    row = int(batch.row_of[query])
    return row, int(batch.firsts[row]) + query - int(batch.starts[row])


def key_place(batch: Pass, arena: Tensor, tokens: int, layer: int, query: int, back: int) -> Tensor | None:
    """Where the key of the position so far ``back`` of a query's is, unless there is none, or elsewhere."""
    row, position = position_of(batch, query)
    position -= back
    page = int(batch.pages[row, 0, position // tokens]) if position >= 0 else -1
    return None if page < 0 else arena[page].view(torch.int64)[layer * tokens + position % tokens :][:1]


def put_pair(target: Tensor, query: int, state: tuple[int, int]) -> None:
    target[query] = torch.tensor(state)


class FakeSides:
    """Makes of workers/cuda/sides.py what computes the model above. ``numbers`` says which model the layers'
    words at an address are."""

    def __init__(self, numbers: dict[int, int], world: World) -> None:
        self.numbers = numbers
        self.world = world

    def enter(self, lane: Tensor, grant: int) -> None:
        lane[w.GRANT], lane[w.FAILED] = grant, 0
        lane[: w.MODEL_WORDS] = torch.from_numpy(at(grant, w.MODEL_WORDS).copy())

    def lead(self, lane: Tensor, layers: int, frequencies: int) -> None:
        lane[w.LAYERS] = layers

    def send(self, lane: Tensor, carried: Carried, sizes: Tensor | None, flag: Flag) -> None:
        if lane[w.FAILED]:
            return
        for target, source in carried:
            target[: int(lane[w.QUERIES])] = source[: int(lane[w.QUERIES])]
        if sizes is not None:
            sizes[w.ROWS : w.QUERIES + 1] = lane[w.ROWS : w.QUERIES + 1]
        flag.sent[0] += 1
        assert flag.raised < flag.sent, "a flag only ever grows"
        flag.raised[0] = flag.sent[0]

    def receive(self, lane: Tensor, flag: Flag) -> None:
        if lane[w.FAILED]:
            return
        assert flag.raised <= flag.taken + 1, "something has crossed unseen"
        if flag.raised > flag.taken:
            flag.taken[0] += 1
        elif self.world.impatient:
            lane[w.FAILED] = 1
        else:
            raise NotYetError

    def settle(self, lane: Tensor, flags: Tensor, *, failed: bool) -> None:
        flags[:, TAKEN] = flags[:, RAISED]
        lane[w.FAILED] = failed

    def attention(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
    ) -> FakeAttention:
        return FakeAttention(geometry, limits, around, ring, room)

    def ffn(
        self, geometry: Geometry, queries: int, part: int, parts: int, chip: Chip, lane: Tensor, room: Room
    ) -> FakeFfn:
        return FakeFfn(self.numbers, part, lane)


class FakeFfn:
    def __init__(self, numbers: dict[int, int], part: int, lane: Tensor) -> None:
        self._numbers, self._part, self._lane = numbers, part, lane

    def ffn(self, layer: int, normed: Tensor, out: Tensor) -> None:
        queries = int(self._lane[w.QUERIES])
        if queries:
            model = self._numbers[int(self._lane[w.LAYERS])]
            for query in range(queries):
                out[query] = torch.tensor(fed(tuple(normed[query].tolist()), layer, model, self._part))


class FakeAttention:
    """See attention_side.AttentionSidePass; pages hold int64 keys, [layer][token]."""

    def __init__(
        self, geometry: Geometry, limits: Limits, around: HomeSurroundings, ring: Ring, room: Room
    ) -> None:
        self.batch, self.rows = carve_pass(room, geometry, limits)
        self.hidden: HiddenStates = carve_hidden(room, geometry, limits.queries, around.parts)
        self._layers, self._tokens = geometry.num_layers, geometry.layout.tokens_per_page
        self._arena, self._ring = around.arena, ring
        self.lane = self.batch.lane

    def _grant(self) -> tuple[np.ndarray, np.ndarray]:
        address = int(self.lane[w.GRANT])
        grant = at(address, g.GRANT_WORDS)
        rows = at(address + 8 * g.GRANT_WORDS, int(grant[g.GRANT_ROWS]) * g.ROW_WORDS)
        return grant, rows.reshape(-1, g.ROW_WORDS)

    def ask_again(self) -> None:
        """As kernels/triton/pass_again.py."""
        grant, _ = self._grant()
        held = at(grant[g.FLAGS], g.FLAG_WORDS)[g.HELD]
        self.lane[w.AGAIN] = int(not grant[g.GRANT_OVER] and grant[g.GRANT_STEPS] > held)

    def begin(self) -> None:
        grant, rows = self._grant()
        flags = at(grant[g.FLAGS], g.FLAG_WORDS + len(rows))
        going = [] if grant[g.GRANT_OVER] else range(len(rows))
        place, query = 0, 0
        for number in going:
            row = rows[number]
            if row[g.DONE] or not flags[g.WANTED + number]:
                continue
            count = int(row[g.COUNT])
            tokens = [row[g.NEXT]] if row[g.MADE] else at(row[g.INPUTS], count, ctypes.c_int32).tolist()
            chunks = int(row[g.CHUNKS])
            pages = at(row[g.TABLES], self.batch.pages.shape[1] * chunks, ctypes.c_int32)
            self.batch.pages[place, :, :chunks] = torch.from_numpy(pages.reshape(-1, chunks).copy())
            self.batch.starts[place], self.batch.firsts[place] = query, int(row[g.FIRST])
            self.rows.numbers[place], self.rows.choices[place] = number, int(row[g.CHOICE])
            for token in tokens:
                self.batch.row_of[query] = place
                self.hidden.stream[query] = torch.tensor(embedded(int(token)))
                query += 1
            place += 1
        self.batch.starts[place] = query
        self.lane[w.ROWS], self.lane[w.QUERIES] = place, query

    def _key(self, layer: int, query: int, back: int) -> Tensor | None:
        return key_place(self.batch, self._arena, self._tokens, layer, query, back)

    def _stream(self, query: int) -> tuple[int, int]:
        outputs = [tuple(part.tolist()) for part in self.hidden.outputs[:, query]]
        return _sum(tuple(self.hidden.stream[query].tolist()), outputs)

    def _input(self, layer: int, query: int) -> tuple[int, int]:
        return self._stream(query) if layer else tuple(self.hidden.stream[query].tolist())

    def attention(self, layer: int) -> None:
        for query in range(int(self.lane[w.QUERIES])):
            before, place = self._key(layer, query, 1), self._key(layer, query, 0)
            state, key = attended(self._input(layer, query), layer, 0 if before is None else int(before))
            assert place is not None
            place[0] = key
            for target in (self.hidden.stream, self.hidden.normed):
                put_pair(target, query, state)

    def head(self) -> None:
        for row in range(int(self.lane[w.ROWS])):
            query = int(self.batch.starts[row + 1]) - 1
            self.rows.chosen[row] = chosen(self._stream(query), position_of(self.batch, query)[1])
        self.end()

    def end(self) -> None:
        """As kernels/triton/pass_end.py; there are no stop tokens."""
        grant, rows = self._grant()
        if grant[g.GRANT_OVER]:
            return
        flags, going = at(grant[g.FLAGS], g.FLAG_WORDS + len(rows)), False
        if self.lane[w.FAILED]:
            grant[g.GRANT_OVER] = 1
            self._tell(g.SILENCE, int(grant[g.NUMBER]), 0, 0, 0)
            return
        for place in range(int(self.lane[w.ROWS])):
            number = int(self.rows.numbers[place])
            row, token = rows[number], int(self.rows.chosen[place])
            row[g.FIRST] += row[g.COUNT]
            row[g.COUNT] = 1
            if row[g.CHOICE] == 0:
                row[g.DONE] = 1
                continue
            row[g.MADE] += 1
            row[g.NEXT] = token
            row[g.DONE] = row[g.MADE] in (row[g.ROW_STEPS], row[g.REMAINING])
            if flags[g.WANTED + number]:
                self._tell(g.TOKEN, int(grant[g.NUMBER]), number, token, int(row[g.MADE]))
                going |= not row[g.DONE]
        grant[g.GRANT_STEPS] -= 1
        if flags[g.RECALLED] or grant[g.GRANT_STEPS] == 0 or not going:
            grant[g.GRANT_OVER] = 1
            self._tell(g.END, int(grant[g.NUMBER]), 0, 0, 0)
        self.ask_again()

    def _tell(self, kind: int, *values: int) -> None:
        records = int(self.lane[w.RECORDS])
        words = [records + 1, kind, *values]
        self._ring.records[records % len(self._ring.records), : len(words)] = torch.tensor(words)
        self.lane[w.RECORDS] = records + 1
        self._ring.written[0] = records + 1
